"""What `sip real` runs: two experiments, their arms over seeds, and the settings of each run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sip_engine.config.files import shipped_configs
from sip_engine.config.parse import merge_settings, parse_config, read_toml
from sip_engine.config.schema import RunConfig
from sip_engine.experiments.scale import shortened
from sip_engine.policy.checkpoint import read_state
from sip_engine.utils.errors import ConfigError

STANDARD, SELF_IMPROVING = "standard", "self_improving"
ARMS = (STANDARD, SELF_IMPROVING)
_FORM_MINUTES = 10
"""What the files in configs/real were made for, on two idle cores."""
_JUDGE_FORM_MINUTES = 10
"""What configs/real/judge_warm.toml and judge_grpo.toml were made for."""
_JUDGE_SHARE = 10
_MANY_SEEDS = 30
_NUM_PREFIXES = 32
_LEAST = {"steps": 2}


@dataclass(frozen=True)
class Experiment:
    """A base and two ways to go on from it on the same documents."""

    name: str
    title: str
    from_scratch: bool
    """Whether its base is trained here; else it is the real model."""


EXPERIMENTS = (
    Experiment("continued", "The real model, continued", from_scratch=False),
    Experiment("scratch", "A small policy from scratch", from_scratch=True),
)


@dataclass(frozen=True)
class Form:
    """How much is done: seeds, steps as a share of those in configs/real, and held-out prefixes that are measured."""

    minutes: float
    """Of both experiments."""
    seeds: tuple[int, ...]
    scale: float
    num_prefixes: int
    judge_minutes: float = 0.0
    """Of the judge's own training; 0: none."""

    @property
    def judge_scale(self) -> float:
        """Steps and pairs of the judge's training as a share of those in configs/real."""
        return self.judge_minutes / _JUDGE_FORM_MINUTES


def form_of(minutes: float, judge_minutes: float | None = None) -> Form:
    """What fits into so many minutes of two idle cores: from half an hour on three seeds, else one.

    judge_minutes: of these, for the judge's own training; None is a tenth from half an hour on, else nothing: ten
    minutes are what both experiments need, and none of them uses that judge.

    Raises:
        ConfigError: minutes is not in [1, 600], or the judge leaves the experiments less than one.
    """
    if not 1 <= minutes <= 600:
        raise ConfigError(f"--minutes {minutes:g}: must be from 1 to 600; 10 and 60 are the usual ones")
    seeds = (1, 2, 3) if minutes >= _MANY_SEEDS else (1,)
    if judge_minutes is None:
        judge_minutes = minutes / _JUDGE_SHARE if len(seeds) > 1 else 0.0
    if not 0 <= judge_minutes <= minutes - 1:
        raise ConfigError(
            f"--judge-minutes {judge_minutes:g}: must be from 0 (no judge is trained) to {minutes - 1:g}, "
            "one less than --minutes"
        )
    left = minutes - judge_minutes
    scale = left / _FORM_MINUTES / len(seeds)
    return Form(left, seeds, scale, max(8, round(_NUM_PREFIXES * min(2.0, scale))), judge_minutes)


@dataclass(frozen=True)
class Plan:
    """Everything that decides what comes out, but the weights and texts themselves."""

    out: Path
    form: Form
    model: Path
    """Checkpoint of the real model."""
    text: Path | None
    """The user's own text; None is that of the machine."""

    def base(self, experiment: Experiment) -> Path:
        """The checkpoint, or the run, that both arms start from."""
        return self.out / f"{experiment.name}_base" if experiment.from_scratch else self.model

    def folder(self, experiment: Experiment, arm: str, seed: int) -> Path:
        return self.out / f"{experiment.name}_{arm}_{seed}"

    def prefixes(self, experiment: Experiment) -> Path:
        """File of the held-out prefixes that an experiment is measured on, with their true suffixes."""
        return self.out / f"{experiment.name}_prefixes.json"

    def runs(self) -> Iterator[tuple[Experiment, str, int]]:
        """Seed by seed, so that there is something to compare early."""
        for seed in self.form.seeds:
            for experiment in EXPERIMENTS:
                for arm in ARMS:
                    yield experiment, arm, seed

    def base_config(self, experiment: Experiment) -> RunConfig:
        """Settings of the run that makes the base of an experiment from scratch."""
        assert experiment.from_scratch
        return self._config(f"{experiment.name}_base", {"out": self.base(experiment), "seed": 1})

    def config(self, experiment: Experiment, arm: str, seed: int) -> RunConfig:
        """Settings of one run; `init` must be there by then if it is the real model."""
        given: dict[str, Any] = {
            "out": self.folder(experiment, arm, seed),
            "seed": seed,
            "init": self.base(experiment),
        }
        if not experiment.from_scratch:
            given["model"] = read_state(self.model).model.without_fp8().model_dump()
        return self._config(f"{experiment.name}_{arm}", given)

    @property
    def judge(self) -> Path:
        """Folder of the judge's own training."""
        return self.out / "judge"

    def judge_documents(self) -> RunConfig:
        """What the judge's lessons and exam are cut from."""
        return self._config(
            "judge_documents", {"out": self.judge, "init": self.model, "seed": 5}, scaled=False
        )

    def judge_config(self, stage: str, init: Path, prompts: Path) -> RunConfig:
        """Settings of a stage of the judge's training, "warm" or "grpo", which goes on from `init`."""
        path = shipped_configs() / "real" / f"judge_{stage}.toml"
        given = {
            "out": self.judge / stage,
            "init": init,
            "model": read_state(self.model).model.without_fp8().model_dump(),
            "data": {"path": prompts, "eval_path": prompts.with_name("eval.jsonl")},
        }
        values = merge_settings(_scaled(read_toml(path), self.form.judge_scale), given)
        return parse_config(values, str(path))

    def _config(self, name: str, given: dict[str, Any], scaled: bool = True) -> RunConfig:
        path = shipped_configs() / "real" / f"{name}.toml"
        data: dict[str, Any] = {"cache": self.out / "cache"}
        if self.text is None:
            folder = self.out / "text"
            data |= {"path": folder / "train.jsonl", "eval_path": folder / "held_out.jsonl"}
        else:
            data |= {"path": self.text, "holdout": 0.05}
        given = given | {"data": data, "judge": {"local": {"checkpoint": self.model}}}
        values = read_toml(path)
        if scaled:
            values = _scaled(values, self.form.scale)
        return parse_config(merge_settings(values, given), str(path))


def _scaled(values: dict[str, Any], scale: float) -> dict[str, Any]:
    warmup = max(1, round(values["optimizer"]["warmup_steps"] * scale))
    return merge_settings(shortened(values, scale, _LEAST), {"optimizer": {"warmup_steps": warmup}})
