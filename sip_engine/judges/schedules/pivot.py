"""Every candidate of a pool against one of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sip_engine.judges.schedules.base import OneRound
from sip_engine.judges.schedules.bradley_terry import expected_mean_wins


class Pivot(OneRound):
    """Every candidate against one of them (method, ablations): num - 1 calls, or twice that."""

    def __init__(
        self, num: int, seed: Sequence[int], pivot: int | None = None, *, both_orders: bool = False
    ) -> None:
        if pivot is None:
            pivot = int(np.random.default_rng([*seed, 2]).integers(num)) if num else 0
        pairs = [(pivot, i) for i in range(num) if i != pivot]
        super().__init__(num, seed, pairs, both_orders=both_orders)

    def quality(self) -> list[float | None]:
        """Expected mean win, see `expected_mean_wins`; those that beat the pivot from the same place are equal."""
        return expected_mean_wins(self._num, self._answers or ())
