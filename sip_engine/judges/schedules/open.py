"""From settings to the schedule of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sip_engine.judges.schedules.all_pairs import AllPairs
from sip_engine.judges.schedules.base import Schedule
from sip_engine.judges.schedules.pivot import Pivot
from sip_engine.judges.schedules.tournament import Tournament, tournament_budget

ScheduleKind = Literal["all_pairs", "pivot", "tournament"]


def make_schedule(
    kind: ScheduleKind, num: int, seed: Sequence[int], *, both_orders: bool, pivot: int | None, share: float
) -> Schedule:
    """The schedule of a pool of `num` candidates; chance comes from `seed` (non-negative integers) alone.

    `pivot` is a candidate number, None for one drawn by seed; `share` is a tournament's share of all calls.
    """
    if kind == "all_pairs":
        return AllPairs(num, seed, both_orders=both_orders)
    if kind == "pivot":
        return Pivot(num, seed, pivot, both_orders=both_orders)
    return Tournament(num, seed, tournament_budget(num, share, both_orders), both_orders=both_orders)
