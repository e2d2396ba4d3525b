"""Choices of random tokens, to update a policy by."""

from __future__ import annotations

import numpy as np

from sip_engine.types import Candidate, Choice, Kind, Sample

VOCAB = 101  # not a multiple of the padding


def random_ids(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(0, VOCAB, size).astype(np.int32)


def choices(seed: int, count: int) -> list[Choice]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        sample = Sample(number, 0, random_ids(rng, 4 + number), random_ids(rng, 6), "", "")
        pool = tuple(Candidate(Kind.ORIGINAL, 0, random_ids(rng, 3 + n), "") for n in range(2))
        made.append(Choice(sample, pool, chosen=number % 2, rejected=1 - number % 2, margin=1.0))
    return made
