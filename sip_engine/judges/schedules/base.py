"""What a schedule is: which pairs of a pool a judge is asked about, and what the answers say of every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sip_engine.judges.schedules.bradley_terry import Answer

Pair = tuple[int, int]
"""Two candidate numbers, the one shown first in front."""


class Schedule(Protocol):
    """The comparisons of one pool: propose a round, record its answers, until nothing is proposed."""

    def propose(self, base: Sequence[float | None] | None) -> list[Pair]:
        """The pairs to ask next.

        `base` is the part of each candidate's reward that needs no comparison, in units of mean wins; None for
        a candidate that is out of the race. While it is not known yet `base` is None, and a schedule that needs
        it proposes nothing.
        """
        ...

    def record(self, answers: Sequence[float | None]) -> None:
        """The answers to the last proposal, in its order: win of the first, None for a failure."""
        ...

    def quality(self) -> list[float | None]:
        """Mean win of each candidate over the pool, in [0, 1]; None for a candidate without any answer."""
        ...


class OneRound:
    """All comparisons in the first round."""

    def __init__(self, num: int, seed: Sequence[int], pairs: list[Pair], *, both_orders: bool) -> None:
        self._num = num
        if both_orders:
            self._pairs = [pair for i, j in pairs for pair in ((i, j), (j, i))]
        else:
            self._pairs = oriented(pairs, num, seed)
        self._answers: list[Answer] | None = None

    def propose(self, base: Sequence[float | None] | None) -> list[Pair]:
        del base
        return [] if self._answers is not None else list(self._pairs)

    def record(self, answers: Sequence[float | None]) -> None:
        self._answers = [(i, j, win) for (i, j), win in zip(self._pairs, answers, strict=True)]


def oriented(pairs: Sequence[Pair], num: int, seed: Sequence[int]) -> list[Pair]:
    """Each pair in one order, such that over all pairs every candidate stands first as often as second.

    Candidates sit in a circle in an order drawn by seed; of two, the one that is less than half a round ahead
    stands first. With an even number of candidates everyone is off by half a comparison.
    """
    seats = np.random.default_rng([*seed, 1]).permutation(num)

    def is_first(i: int, j: int) -> bool:
        ahead = 2 * ((seats[j] - seats[i]) % num)
        return bool(ahead < num or (ahead == num and seats[i] < seats[j]))

    return [(i, j) if is_first(i, j) else (j, i) for i, j in pairs]
