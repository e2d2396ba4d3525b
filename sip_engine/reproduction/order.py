"""Figures of rows over seeds: means and deviations, and whether they put the rows in the paper's order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from sip_engine.config import RunConfig
from sip_engine.objectives import JUDGED
from sip_engine.reproduction.plan import Row, Table

CLEAR_ERRORS = 2.0
"""Standard errors that a difference must exceed to say anything."""


@dataclass(frozen=True)
class Spread:
    """Some measured values in short, in their own unit."""

    mean: float
    deviation: float | None
    """Sample standard deviation (n - 1); None for a single value."""
    count: int

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for a single value."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.count)


@dataclass(frozen=True)
class Pair:
    """Two rows that the published figures put in an order, and what ours make of it."""

    better: str
    """The one that the published figures put first."""
    worse: str
    published: float
    """Difference of the published figures, better minus worse: above 0."""
    ours: float
    """The same difference of our means: below 0 where we have it the other way."""
    error: float | None
    """Its standard error, seeds of both rows taken as independent; None if a row has one seed only."""

    @property
    def is_clear(self) -> bool:
        """Whether our difference is more than `CLEAR_ERRORS` standard errors."""
        return self.error is not None and abs(self.ours) > CLEAR_ERRORS * self.error


@dataclass(frozen=True)
class Order:
    """All pairs of rows that have both figures; pairs with equal published figures are counted only."""

    pairs: tuple[Pair, ...]
    num_tied: int
    """Pairs that the published figures do not part."""
    tau: float | None
    """Kendall's tau-b of the means against the published figures."""

    @property
    def alike(self) -> tuple[Pair, ...]:
        """Pairs clearly in the paper's order."""
        return tuple(pair for pair in self.pairs if pair.is_clear and pair.ours > 0)

    @property
    def reversed(self) -> tuple[Pair, ...]:
        """Pairs clearly the other way."""
        return tuple(pair for pair in self.pairs if pair.is_clear and pair.ours < 0)

    @property
    def undecided(self) -> tuple[Pair, ...]:
        """Pairs whose difference says nothing yet, whichever way it points."""
        return tuple(pair for pair in self.pairs if not pair.is_clear)

    @property
    def agreeing(self) -> tuple[Pair, ...]:
        """Pairs whose means are in the paper's order, clearly or not."""
        return tuple(pair for pair in self.pairs if pair.ours > 0)

    @property
    def other_way(self) -> tuple[Pair, ...]:
        """Pairs whose means are the other way, clearly or not, the largest difference first."""
        return tuple(sorted((pair for pair in self.pairs if pair.ours < 0), key=lambda pair: pair.ours))


class Cost(BaseModel):
    """What a step of a run took, as `reproduction.worker` writes it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    steps: int
    step_seconds: float
    seconds: dict[str, float]
    elapsed: float
    peak_memory_mb: float
    joules_per_step: float | None
    judge: dict[str, float]


class Result(BaseModel):
    """One run of a row, as `reproduction.worker` writes it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    figures: dict[str, float]
    baseline: dict[str, float]
    num_prefixes: int
    cost: Cost

    def base(self, figure: str) -> float | None:
        """The baseline's figure; it wins half of the comparisons with itself."""
        return 0.5 if "win_rate" in figure else self.baseline.get(figure)


class StageResult(BaseModel):
    """A stage, as `reproduction.worker` writes it; made data have neither cost nor evaluations."""

    model_config = ConfigDict(frozen=True)

    settings: dict[str, Any]
    cost: Cost | None = None
    evaluations: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class RowRuns:
    """A row with what is there of it."""

    row: Row
    cfg: RunConfig
    """Settings of its first seed."""
    results: dict[int, Result]
    failed: dict[int, str]
    """Seed -> reason."""
    planned: int

    def spread(self, figure: str, *, relative: bool = False) -> Spread | None:
        """A figure over seeds in percent, or its gain over the baseline in percent of the baseline's."""
        known = [(r.figures[figure], r.base(figure)) for r in self.results.values() if figure in r.figures]
        if relative:
            return spread(100 * (ours / base - 1) for ours, base in known if base)
        return spread(100 * ours for ours, _ in known)

    def cost(self, name: str, part: str | None = None) -> Spread | None:
        """A field of the cost, or a part of one, over the seeds that have it."""
        fields = [getattr(result.cost, name) for result in self.results.values()]
        values = fields if part is None else [field.get(part) for field in fields]
        return spread(value for value in values if value is not None)

    def is_in(self, table: Table) -> bool:
        return table.name in (self.row.table, *self.row.also)

    @property
    def is_judged(self) -> bool:
        return self.cfg.objective.kind in JUDGED

    @property
    def from_scratch(self) -> bool:
        return self.cfg.init is None

    @property
    def title(self) -> str:
        """Its label outside of its table."""
        return self.row.label + (", from scratch" if self.from_scratch else "")


def spread(values: Iterable[float]) -> Spread | None:
    """Mean, sample deviation and number of some finite values; None of none."""
    known = np.array(list(values), np.float64)
    if not len(known):
        return None
    deviation = float(known.std(ddof=1)) if len(known) > 1 else None
    return Spread(float(known.mean()), deviation, len(known))


def compare_order(ours: Mapping[str, Spread], published: Mapping[str, float]) -> Order:
    """Compare our means with published figures of the same unit, over the rows that have both."""
    rows = [name for name in published if name in ours]
    pairs, num_tied = [], 0
    for first, second in combinations(rows, 2):
        if published[first] == published[second]:
            num_tied += 1
            continue
        if published[first] < published[second]:
            first, second = second, first
        errors = [ours[name].error for name in (first, second)]
        known = [error for error in errors if error is not None]
        pairs.append(
            Pair(
                better=first,
                worse=second,
                published=published[first] - published[second],
                ours=ours[first].mean - ours[second].mean,
                error=math.hypot(*known) if len(known) == len(errors) else None,
            )
        )
    tau = kendall_tau([ours[name].mean for name in rows], [published[name] for name in rows])
    return Order(tuple(pairs), num_tied, tau)


def table_bases(table: Table, rows: Sequence[RowRuns]) -> dict[str, Spread | None]:
    """The baseline's figures as the runs of a table's rows measured them, in percent."""
    results = [result for one in rows if one.is_in(table) for result in one.results.values()]
    bases = {}
    for figure in table.figures:
        values = [base for result in results if (base := result.base(figure)) is not None]
        # On the same prefixes it is one measurement, repeated; it varies only with the prefixes.
        bases[figure] = spread(100 * value for value in (values if len(set(values)) > 1 else values[:1]))
    return bases


def table_orders(table: Table, rows: Sequence[RowRuns]) -> dict[str, Order]:
    """For each figure of a table that two rows or more have, our order of them against the paper's."""
    orders = {}
    for figure in table.figures:
        ours, paper = {}, {}
        for one in rows:
            found = one.spread(figure)
            if one.is_in(table) and found is not None and figure in one.row.paper:
                ours[one.row.name], paper[one.row.name] = found, one.row.paper[figure]
        if len(ours) > 1:
            orders[figure] = compare_order(ours, paper)
    return orders


def all_pairs(orders: Iterable[Mapping[str, Order]]) -> Order:
    """The pairs of all tables and figures together; one that stands in several tables is counted once."""
    pairs = {(f, p.better, p.worse): p for found in orders for f, order in found.items() for p in order.pairs}
    return Order(tuple(pairs.values()), 0, None)


def standard_row(one: RowRuns, rows: Sequence[RowRuns]) -> RowRuns | None:
    """Standard pretraining from the same beginning, if a run of it is there."""
    same = [r for r in rows if r.from_scratch == one.from_scratch and r.results]
    return next((r for r in same if r.cfg.objective.kind == "next_token"), None)


def alike_rows(rows: Sequence[RowRuns], *, judge: set[str], candidates: set[str]) -> list[list[RowRuns]]:
    """Judged rows in groups that differ in these settings of judge and candidates only."""
    groups: dict[str, list[RowRuns]] = {}
    for one in rows:
        if one.is_judged:
            free: dict[str, Any] = {"out": True, "seed": True}
            free |= {"judge": judge, "candidates": {"__all__": candidates}}
            groups.setdefault(one.cfg.model_dump_json(exclude=free), []).append(one)
    return list(groups.values())


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b of two equally long sequences, in [-1, 1]; None where one of them has no order.

    Concordant minus discordant pairs, over the geometric mean of the pairs that `a` and that `b` part
    (M. G. Kendall, The treatment of ties in ranking problems, 1945).
    """
    signs = [(_sign(a[i] - a[j]), _sign(b[i] - b[j])) for i, j in combinations(range(len(a)), 2)]
    parted = [sum(1 for pair in signs if pair[side]) for side in (0, 1)]
    if not all(parted):
        return None
    return sum(x * y for x, y in signs) / math.sqrt(parted[0] * parted[1])


def _sign(value: float) -> int:
    return int(value > 0) - int(value < 0)
