"""`sip data sentence-labels`: texts with a label at the end of every sentence, what a judge is trained on first.

One verdict a prompt says too little for a small model to find out by itself what makes a suffix worse, least of all
what takes comparing: that a sentence repeats an earlier one, or is about a stranger. With a label on each sentence it
learns that in minutes, and can then be asked for them (judge.local.method = "sentence_labels";
configs/reproduction/README.md). Only the synthetic world knows the answers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from sip_engine.config.schema import RunConfig
from sip_engine.data.sources import open_world
from sip_engine.llm.compact_prompts import reading_prompt
from sip_engine.llm.untrusted import neutral
from sip_engine.policy.checkpoint import resolve_checkpoint
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.tasks.files import Record, open_documents, read_mix, shuffled, write_records
from sip_engine.tasks.rollout_pairs import ROLLOUTS, sample_rollouts
from sip_engine.tasks.specs import SentenceLabels
from sip_engine.types import Sample
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.progress import console
from sip_engine.world import World
from sip_engine.world.exercises import labels_on_prefix, labels_on_suffix, make_up

_MADE_UP = 4
"""Made-up texts a prefix, beside its rollouts."""
_ANSWER = 16
"""Tokens of the context that are left free: the prompts these texts are mixed with have an answer there."""


def make_sentence_labels(cfg: RunConfig, out: Path, spec: SentenceLabels) -> None:
    """Write `out`/train.jsonl and `out`/eval.jsonl: {"text", "labels": [[end, letter], ...], "kind"}.

    Half of the texts are rollouts of the checkpoint `init`, half are made up of facts, said again or about anyone.
    Those without a label, or as long as the model's context less an answer, are left out. `spec.mix` is a folder of a
    judge's prompts, that `sip data` wrote, all of which are shuffled among them.

    Raises:
        SipError: bad settings or data, before anything is written.
    """
    world = open_world(cfg)
    if world is None:
        raise ConfigError("notes: only the synthetic world knows what is wrong with a sentence; add [world]")
    if cfg.init is None:
        raise ConfigError("notes are about a policy's rollouts: set init to a checkpoint")
    mixed_train, mixed_eval = read_mix(spec.mix)
    mesh, corpus = open_documents(cfg, out, "judge", spec.held_out)
    policy, _ = FrozenPolicy.load(resolve_checkpoint(cfg.init), mesh)
    sampler = policy.sampler(cfg.sampler)

    def fits(text: str) -> bool:
        return 1 + len(corpus.tokenizer.encode(text)) + _ANSWER <= policy.max_context

    def records(samples: Sequence[Sample], wanted: int, seed: int) -> list[Record]:
        some = samples[: _num_prefixes(wanted)]
        rollouts = sample_rollouts(sampler, corpus.tokenizer, some, seed)
        noted = [
            one
            for one in _labelled_texts(world, some, rollouts, cfg.data.suffix_tokens, seed)
            if one["labels"]
        ]
        made = [one for one in noted if fits(one["text"])]
        if len(made) < len(noted):
            console.print(
                f"{len(noted) - len(made):,} of {len(noted):,} texts do not fit the {policy.max_context} tokens of "
                "init's context and are left out"
            )
        return shuffled(made, seed)[:wanted]

    number = min(corpus.num_samples, _num_prefixes(spec.num))
    train = records(corpus.stream.samples_at(0, number), spec.num, cfg.seed) + mixed_train
    held_out = records(corpus.held_out, spec.held_out, cfg.seed + 1) + mixed_eval
    write_records(out, shuffled(train, cfg.seed), held_out, wanted=spec.num + len(mixed_train))


def _num_prefixes(num_texts: int) -> int:
    return -(-num_texts // (ROLLOUTS + _MADE_UP))


def _labelled_texts(
    world: World, samples: Sequence[Sample], rollouts: Sequence[Sequence[str]], suffix_tokens: int, seed: int
) -> Iterator[Record]:
    """Each rollout, and texts made up for the same prefix: half to twice as many words as a suffix has tokens."""
    rng = random.Random(seed)
    for sample, group in zip(samples, rollouts, strict=True):
        for text in group:
            yield labelled_text(world, sample.prefix, text) | {"kind": "rollout"}
        for _ in range(_MADE_UP):
            words = rng.randint(suffix_tokens // 2, 2 * suffix_tokens)
            yield labelled_text(world, *make_up(world, sample.prefix, words, rng)) | {"kind": "made_up"}


def labelled_text(world: World, prefix: str, suffix: str) -> Record:
    """The text as a judge reads it, with the labels of the sentences of the prefix and the suffix."""
    text, start = reading_prompt(prefix, suffix)
    # What cannot be seen is shown as something longer.
    labels = [[1 + len(neutral(prefix[: one.end])), one.letter] for one in labels_on_prefix(world, prefix)]
    labels += [
        [start + len(neutral(suffix[: one.end])), one.letter]
        for one in labels_on_suffix(world, prefix, suffix)
    ]
    return {"text": text, "labels": labels}
