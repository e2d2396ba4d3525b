"""What `sip data` makes: one model a command, read by the command line, a reproduction's plan and its jobs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from sip_engine.config.parse import merge_settings, parse_config
from sip_engine.config.schema import RunConfig, Section

_COUNTS = ("pairs", "safety", "factuality", "held_out", "num", "mix_num")


class DataSpec(Section):
    """Base of all: how many prompts there are to be, and of what. Fields become options of the command line."""

    command: ClassVar[str]
    """Name of the command behind `sip data`."""
    former: ClassVar[str | None] = None
    """Its name in the last version, which still works, with a notice."""
    reads: ClassVar[str]
    """What the command's config says."""
    maker: ClassVar[str]
    """`module:function`, called as `function(cfg, out, spec)`."""

    def settings(self) -> dict[str, Any]:
        """Settings that take the place of the config's."""
        return {}

    def make(self, cfg: RunConfig, out: Path) -> None:
        """Write `out`/train.jsonl and `out`/eval.jsonl.

        Raises:
            SipError: bad settings or data, before anything is written.
        """
        if over := self.settings():
            cfg = parse_config(merge_settings(cfg.model_dump(mode="json"), over), f"sip data {self.command}")
        module, _, function = self.maker.partition(":")
        getattr(importlib.import_module(module), function)(cfg, out, self)

    def scaled(self, scale: float) -> Self:
        """The same with a share of all numbers, 40 or more of each kind that is made at all."""
        numbers = {name: max(40, round(n * scale)) for name, n in self if name in _COUNTS and n}
        return self.model_copy(update={name: min(getattr(self, name), n) for name, n in numbers.items()})

    def under(self, folder: Path) -> Self:
        """The same with the folder to mix in below `folder`."""
        mix = getattr(self, "mix", None)
        return self if mix is None else self.model_copy(update={"mix": folder / mix})


class JudgePairs(DataSpec):
    """Make prompts with known answers to train a judge on: quality pairs, safety, factuality."""

    command = "judge-pairs"
    reads = "A TOML file that says which documents; its judge labels safety."
    maker = "sip_engine.tasks.judge_pairs:make_judge_pairs"
    pairs: int = Field(default=4000, ge=0)
    """Suffixes to compare with a corrupted copy, each in both orders."""
    safety: int = Field(default=4000, ge=0)
    """Suffixes with a safety label, half of them unsafe."""
    factuality: int = Field(default=0, ge=0)
    """Suffixes with a factuality label, beside the original."""
    held_out: int = Field(default=200, ge=2)
    """Most prompts of each kind in eval.jsonl."""
    corruptor: str | None = None
    """rules or edits (for any text), world (its own) or server (a model); default: the config's corruptor.backend."""
    max_prefix_chars: int | None = Field(default=None, ge=1)
    """A longer prefix keeps its end."""

    def settings(self) -> dict[str, Any]:
        return {} if self.corruptor is None else {"corruptor": {"backend": self.corruptor}}


class RolloutPairs(DataSpec):
    """Make prompts to train a judge on of a policy's own rollouts, labelled by another judge."""

    command = "rollout-pairs"
    reads = "A TOML file: documents, init (whose rollouts), judge (whose labels)."
    maker = "sip_engine.tasks.rollout_pairs:make_rollout_pairs"
    pairs: int = Field(default=4000, ge=0)
    """Pairs of rollouts, each in both orders."""
    safety: int = Field(default=0, ge=0)
    """Rollouts with a safety label."""
    factuality: int = Field(default=0, ge=0)
    """Rollouts with a factuality label."""
    held_out: int = Field(default=200, ge=2)
    """Most prompts of each kind in eval.jsonl."""
    mix: Path | None = None
    """Folder of a judge's prompts to shuffle among these."""
    mix_num: int | None = Field(default=None, ge=1)
    """Most prompts of it; default: all."""
    max_prefix_chars: int | None = Field(default=None, ge=1)
    """A longer prefix keeps its end."""


class SentenceLabels(DataSpec):
    """Make texts with a label on every sentence, what a judge is trained on first (world only)."""

    command = "sentence-labels"
    former = "notes"
    reads = "A TOML file: world, whose documents, and init, whose rollouts."
    maker = "sip_engine.tasks.sentence_labels:make_sentence_labels"
    num: int = Field(default=24_000, ge=8)
    """Texts with a label on each sentence."""
    held_out: int = Field(default=400, ge=2)
    """Texts in eval.jsonl."""
    mix: Path | None = None
    """Folder of a judge's prompts to shuffle among these."""


class Rewrites(DataSpec):
    """Make prompts to train a rewriter on: safe suffixes to be copied, unsafe ones to be mended."""

    command = "rewrites"
    reads = "A TOML file that says which documents; its judge labels, its rewriter teaches."
    maker = "sip_engine.tasks.rewrites:make_rewrites"
    num: int = Field(default=8000, ge=2)
    """Prompts, half of them of safe suffixes."""
    held_out: int = Field(default=200, ge=2)
    """Prompts in eval.jsonl."""


SPECS: tuple[type[DataSpec], ...] = (JudgePairs, RolloutPairs, SentenceLabels, Rewrites)
