"""`sip data lessons`: sentences of a policy's rollouts and what is wrong with each, a judge's first lessons.

One verdict a prompt says too little for a small model to find out by itself what makes a suffix worse, least of all
what takes comparing: that a sentence repeats an earlier one, or is about a stranger. Asked for one sentence after a
few, it learns that in minutes (README, training a judge). Only the synthetic world knows the answers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from sip_engine.checkpoint import resolve_checkpoint
from sip_engine.config import RunConfig
from sip_engine.corpus import open_world
from sip_engine.errors import ConfigError
from sip_engine.evaluation.frozen import FrozenPolicy
from sip_engine.judges.compact import notes_prompt
from sip_engine.make_data import open_documents, write_records
from sip_engine.makers import Record, shuffled
from sip_engine.rollout_data import ROLLOUTS, sample_rollouts
from sip_engine.types import Sample
from sip_engine.world import World
from sip_engine.world.exercises import exercises

_PER_PREFIX = 2 * ROLLOUTS
"""Exercises that a prefix surely gives and that are kept."""
_MOST = 5
"""No note is the answer of more than one in so many: most sentences are neutral, and tell least."""
LESSON = "lesson"


def make_lessons(cfg: RunConfig, out: Path, *, num: int, num_eval: int, max_sentences: int) -> None:
    """Write `out`/train.jsonl and `out`/eval.jsonl: prompts of one sentence each, answered by its `Note`.

    The rollouts are those of the checkpoint `init`. A context has at most `max_sentences` sentences.

    Raises:
        SipError: bad settings or data, before anything is written.
    """
    world = open_world(cfg)
    if world is None:
        raise ConfigError(
            "lessons: only the synthetic world knows what is wrong with a sentence; add [world]"
        )
    if cfg.init is None:
        raise ConfigError("lessons are about a policy's rollouts: set init to a checkpoint")
    mesh, corpus = open_documents(cfg, out, "judge", num_eval)
    policy, _ = FrozenPolicy.load(resolve_checkpoint(cfg.init), mesh)
    sampler = policy.sampler(cfg.sampler)

    def records(samples: Sequence[Sample], wanted: int, seed: int) -> list[Record]:
        some = samples[: -(-wanted // _PER_PREFIX)]
        rollouts = sample_rollouts(sampler, corpus.tokenizer, some, seed)
        made = shuffled(list(_lessons(world, some, rollouts, max_sentences, seed)), seed)
        return list(_balanced(made, wanted))

    wanted = min(corpus.num_samples, -(-num // _PER_PREFIX))
    train = records(corpus.stream.samples_at(0, wanted), num, cfg.seed)
    write_records(out, train, records(corpus.held_out, num_eval, cfg.seed + 1), wanted=num)


def _balanced(records: Sequence[Record], wanted: int) -> Iterator[Record]:
    """The first records, until there are enough, that keep the answers balanced."""
    seen: Counter[str] = Counter()
    for record in records:
        if seen[record["answer"]] < max(1, wanted // _MOST) and seen.total() < wanted:
            seen[record["answer"]] += 1
            yield record


def _lessons(
    world: World,
    samples: Sequence[Sample],
    rollouts: Sequence[Sequence[str]],
    max_sentences: int,
    seed: int,
) -> Iterator[Record]:
    rng = random.Random(seed)
    for sample, group in zip(samples, rollouts, strict=True):
        for text in group:
            for one in exercises(world, sample.prefix, text, rng, max_sentences=max_sentences):
                kind = f"{LESSON}_{one.note.name.lower()}"
                yield {"prompt": notes_prompt(one.context, one.sentence), "answer": one.note, "kind": kind}
