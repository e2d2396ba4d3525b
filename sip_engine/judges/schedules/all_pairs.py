"""Every candidate of a pool against every other one."""

from __future__ import annotations

from collections.abc import Sequence

from sip_engine.judges.schedules.base import OneRound


class AllPairs(OneRound):
    """Every candidate against every other one (method, rewards): num (num - 1) / 2 calls, or twice that."""

    def __init__(self, num: int, seed: Sequence[int], *, both_orders: bool = False) -> None:
        pairs = [(i, j) for i in range(num) for j in range(i + 1, num)]
        super().__init__(num, seed, pairs, both_orders=both_orders)

    def quality(self) -> list[float | None]:
        """Mean win over a candidate's answered comparisons."""
        won: list[list[float]] = [[] for _ in range(self._num)]
        for i, j, win in self._answers or ():
            if win is not None:
                won[i].append(win)
                won[j].append(1.0 - win)
        return [sum(wins) / len(wins) if wins else None for wins in won]
