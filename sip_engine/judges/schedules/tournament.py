"""Comparisons chosen round by round, by what each is expected to tell about the best and the worst of a pool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sip_engine.judges.schedules.base import Pair
from sip_engine.judges.schedules.bradley_terry import (
    Answer,
    Known,
    Strengths,
    expected_mean_wins,
    fit_strengths,
    shrinkage,
    tally,
    win_odds,
)

_SOFTNESS = 0.01
"""Temperature, in mean wins, of the soft maximum: without it most single answers seem to be worth nothing."""
_LEAST_GAIN = 1e-4
"""A tournament ends when no answer is expected to widen the gap of mean wins by more than this."""
_PATIENCE = 2
"""Failed comparisons after which a candidate without any answer is given up."""


def tournament_budget(num: int, share: float, both_orders: bool = False) -> int:
    """Most calls of a tournament of `num` candidates: `share` of all pairs' calls, rounded down.

    It is never less than ceil(3 num / 2) - 2 pairs, what an unerring judge needs to settle both ends: pairing
    everyone, then the winners and the losers among themselves. Small pools hence spend a larger share.
    """
    every = num * (num - 1) // 2
    needed = max(0, (3 * num + 1) // 2 - 2)
    pairs = min(every, max(needed, math.floor(share * every + 1e-9)))
    return pairs * (1 + both_orders)


class Tournament:
    """Comparisons chosen round by round to find the best and the worst candidate, which is all DPO needs.

    After every round the strengths are estimated anew (`fit_strengths`), and the next questions are those whose
    answer is expected to widen the gap of total reward between best and worst candidate most (the knowledge
    gradient of that gap). The estimate knows how noisy the judge is, so it asks on where one answer is not
    enough. No pair is asked twice: a judge's second answer to a question is no independent one.

    - Every candidate that could still be best or worst is compared at least once; one whose `base` puts it out
      of reach of both ends never.
    - Calls are kept back for what an unerring judge would need to settle both ends, so that among candidates of
      equal `base` such a judge's best and worst are found with any budget of `tournament_budget`.
    - It ends at `budget` calls, or earlier when no answer is worth its call. A failed call counts too.
    - With `both_orders` a pair costs two calls, one each way; else whoever stood first less often stands first.
    """

    def __init__(self, num: int, seed: Sequence[int], budget: int, *, both_orders: bool = False) -> None:
        self._num, self._budget, self._both_orders = num, budget, both_orders
        luck = np.random.default_rng([*seed, 3]).random((num, num)) * 1e-9
        self._luck = luck + luck.T
        """Breaks ties between pairs, and by its diagonal between candidates."""
        self._answers: list[Answer] = []
        self._pending: list[Pair] = []
        self._asked = np.eye(num, dtype=bool)
        self._firsts = np.zeros(num, int)
        self._modes: np.ndarray | None = None
        self._round = 0

    def propose(self, base: Sequence[float | None] | None) -> list[Pair]:
        pairs = [] if base is None else self._choose(base)
        self._pending = []
        for i, j in pairs:
            self._asked[i, j] = self._asked[j, i] = True
            first, second = (i, j) if self._shown_first(i) <= self._shown_first(j) else (j, i)
            self._firsts[first] += 1
            self._firsts[second] -= 1
            self._pending += [(first, second), (second, first)] if self._both_orders else [(first, second)]
        self._round += bool(pairs)
        return list(self._pending)

    def record(self, answers: Sequence[float | None]) -> None:
        self._answers += [(i, j, win) for (i, j), win in zip(self._pending, answers, strict=True)]
        self._pending = []

    def quality(self) -> list[float | None]:
        """Expected mean win, see `expected_mean_wins`; None also for a candidate that nobody asked about."""
        return expected_mean_wins(self._num, self._answers)

    def _shown_first(self, n: int) -> float:
        return self._firsts[n] + self._luck[n, n]

    def _choose(self, base: Sequence[float | None]) -> list[Pair]:
        """The next round's pairs, each candidate in one of them at most; none when the tournament is over."""
        known = [(i, j, win) for i, j, win in self._answers if win is not None]
        heard = np.zeros(self._num, bool)
        heard[[n for i, j, _ in known for n in (i, j)]] = True
        race = _Race.of(base, self._given_up(heard), self._num)
        left = (self._budget - len(self._answers)) // (1 + self._both_orders)
        pairs = np.argwhere(np.triu(~self._asked & race.running[:, None] & race.running))
        if left <= 0 or not len(pairs):
            return []
        gains = _gains(self._fit(known), race, pairs)
        unheard = race.running & ~heard
        if not unheard.any() and gains.max() < _LEAST_GAIN:
            return []
        # Everyone once before anyone is asked for the gain; this also pairs all in the first round.
        order = np.argsort(-(gains + self._luck[tuple(pairs.T)] + 10.0 * unheard[pairs].sum(1)))
        half = max(1, int(race.running.sum()) // 2)
        size = min(left, half if self._round < 2 else min(half, max(2, left // 4)))
        open_top, open_bottom = self._undecided(known, race)
        ranked = [(i, j) for i, j in pairs[order].tolist()]
        return _matching(ranked, size, left, open_top, open_bottom) or ranked[:1]

    def _fit(self, known: Sequence[Known]) -> Strengths:
        strengths = fit_strengths(self._num, known, self._modes)
        self._modes = strengths.modes
        return strengths

    def _given_up(self, heard: np.ndarray) -> np.ndarray:
        """Candidates whose comparisons only fail."""
        failed = np.zeros(self._num, int)
        for i, j, win in self._answers:
            if win is None:
                failed[[i, j]] += 1
        return ~heard & (failed >= _PATIENCE * (1 + self._both_orders))

    def _undecided(self, known: Sequence[Known], race: _Race) -> tuple[np.ndarray, np.ndarray]:
        """Who can still be best, and worst, if every answer were right."""
        top, bottom = race.can_win.copy(), race.can_lose.copy()
        wins, counts = tally(self._num, known)
        for i, j in np.argwhere(counts > 0):
            win = wins[i, j] / counts[i, j]
            # Of two equals one stands for both at the top, the other one at the bottom.
            ahead = win > 0.5 or (win == 0.5 and self._luck[i, i] > self._luck[j, j])
            if ahead and race.base[i] >= race.base[j]:
                top[j] = bottom[i] = False
        return top, bottom


@dataclass(frozen=True)
class _Race:
    """What `base` leaves to be decided: who could be best and who could be worst, whatever the comparisons."""

    base: np.ndarray
    can_win: np.ndarray
    can_lose: np.ndarray

    @property
    def running(self) -> np.ndarray:
        return self.can_win | self.can_lose

    @classmethod
    def of(cls, base: Sequence[float | None], out: np.ndarray, num: int) -> _Race:
        """`out`: candidates that cannot get a reward any more, besides those without a base."""
        values = np.array([0.0 if b is None else b for b in base], float)
        judged = np.array([b is not None for b in base], bool) & ~out
        if judged.sum() < 2:
            return cls(values, np.zeros(num, bool), np.zeros(num, bool))
        # Mean wins lie in [0, 1].
        can_win = judged & (values + 1.0 > values[judged].max())
        return cls(values, can_win, judged & (values - 1.0 < values[judged].min()))


def _gains(strengths: Strengths, race: _Race, pairs: np.ndarray) -> np.ndarray:
    """Expected growth of the (soft) gap between best and worst total, in mean wins, by asking each pair [n]."""
    mean, cov = strengths.mean, strengths.cov
    odds, slope = win_odds(mean, cov)
    others = max(1, len(mean) - 1)
    np.fill_diagonal(slope, 0.0)
    totals = (race.base + (odds.sum(1) - 0.5) / others)[:, None]
    i, j = pairs.T
    # An answer moves the strengths along cov (e_i - e_j); mean wins follow by their Jacobian.
    jacobian = (np.diag(slope.sum(1)) - slope) / others
    moves = jacobian @ (cov[:, i] - cov[:, j]) * shrinkage(cov[i, i] + cov[j, j] - 2.0 * cov[i, j])
    win = odds[i, j]

    def gap(values: np.ndarray) -> np.ndarray:
        return _soft_max(values[race.can_win]) + _soft_max(-values[race.can_lose])

    after = win * gap(totals + moves * (1.0 - win)) + (1.0 - win) * gap(totals - moves * win)
    return after - gap(totals)


def _soft_max(values: np.ndarray) -> np.ndarray:
    """_SOFTNESS * log sum exp(values / _SOFTNESS) over the first axis; 0 of nothing."""
    if not len(values):
        return np.zeros(values.shape[1:])
    top = values.max(0)
    return top + _SOFTNESS * np.log(np.exp((values - top) / _SOFTNESS).sum(0))


def _matching(
    ranked: Sequence[Pair], size: int, left: int, open_top: np.ndarray, open_bottom: np.ndarray
) -> list[Pair]:
    """The first `size` pairs in which no candidate comes twice.

    `left` calls must still suffice to knock out all but one of `open_top` and of `open_bottom`: while they just
    do, only pairs of two that are open at the same end are taken, since one of them falls out.
    """
    needed = max(0, int(open_top.sum()) - 1) + max(0, int(open_bottom.sum()) - 1)
    keep = needed <= left
    taken: list[Pair] = []
    used: set[int] = set()
    for i, j in ranked:
        if len(taken) == size:
            break
        falls = int(open_top[i] and open_top[j]) + int(open_bottom[i] and open_bottom[j])
        if used & {i, j} or (keep and needed - falls > left - 1):
            continue
        taken.append((i, j))
        used |= {i, j}
        needed -= falls
        left -= 1
    return taken
