"""Figures of rows over seeds: means and deviations, and whether they put the rows in the paper's order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from sip_engine.config.objective import LearnsFrom
from sip_engine.config.schema import RunConfig
from sip_engine.experiments.reproduction.plan import Arm, Table
from sip_engine.types import Kind

CHANCE = 0.05
"""Share of pairs of equal rows that pass for parted: intervals and tests are two-sided at 95 %."""


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

    @property
    def margin(self) -> float | None:
        """Half of the mean's 95 % interval, by Student's t; None for a single value."""
        return None if self.error is None else _t_quantile(self.count - 1) * self.error


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
    bar: float | None
    """What our difference must exceed to be beyond seed noise; None if the seeds tell nothing of it: a row has one
    only, or all seeds of both rows agree, as a few may by chance."""

    @property
    def is_beyond_noise(self) -> bool:
        """Whether our difference is more than other seeds would be expected to make of equal rows."""
        # One prefix more or less is exactly the floor but for rounding.
        return self.bar is not None and abs(self.ours) > self.bar * (1 + 1e-9)


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
        """Pairs in the paper's order, beyond seed noise."""
        return tuple(pair for pair in self.pairs if pair.is_beyond_noise and pair.ours > 0)

    @property
    def reversed(self) -> tuple[Pair, ...]:
        """Pairs the other way, beyond seed noise."""
        return tuple(pair for pair in self.pairs if pair.is_beyond_noise and pair.ours < 0)

    @property
    def undecided(self) -> tuple[Pair, ...]:
        """Pairs whose difference says nothing yet, whichever way it points."""
        return tuple(pair for pair in self.pairs if not pair.is_beyond_noise)

    @property
    def num_tested(self) -> int:
        """Pairs with seeds enough to be told from noise."""
        return sum(pair.bar is not None for pair in self.pairs)

    @property
    def by_chance(self) -> float:
        """How many pairs would be beyond seed noise, either way, if no two rows differed."""
        return CHANCE * self.num_tested

    @property
    def agreeing(self) -> tuple[Pair, ...]:
        """Pairs whose means are in the paper's order, beyond noise or not."""
        return tuple(pair for pair in self.pairs if pair.ours > 0)

    @property
    def other_way(self) -> tuple[Pair, ...]:
        """Pairs whose means are the other way, beyond noise or not, the largest difference first."""
        return tuple(sorted((pair for pair in self.pairs if pair.ours < 0), key=lambda pair: pair.ours))


class Cost(BaseModel):
    """What a step of a run took, as `reproduction.worker` writes it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    steps: int
    step_seconds: float
    seconds: dict[str, float]
    elapsed: float
    peak_memory_mb: float | None
    joules_per_step: float | None
    judge: dict[str, float]


class Result(BaseModel):
    """One run of a row, as `reproduction.worker` writes it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    recipe: dict[str, Any] = {}
    """All that decided it, `plan.arm_recipe` when it was made."""
    figures: dict[str, float]
    baseline: dict[str, float]
    num_prefixes: int
    num_safe_prefixes: int | None = None
    cost: Cost

    def num_behind(self, figure: str) -> int:
        """Prefixes that a figure is of."""
        return (figure.endswith("_safe") and self.num_safe_prefixes) or self.num_prefixes

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
class ArmRuns:
    """A row with what is there of it."""

    row: Arm
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
        return self.cfg.objective.facts.needs_judge

    @property
    def kinds(self) -> set[str]:
        """Kinds of candidates that any stage of its curriculum has."""
        has = [(stage.original, stage.rewrite, stage.rollouts) for stage in self.cfg.candidates]
        return {kind for one in has for kind, number in zip(Kind, one, strict=True) if number}

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


def _t_quantile(freedom: float) -> float:
    """What Student's t of so many degrees of freedom exceeds, either way, with probability `CHANCE`."""
    return float(stats.t.ppf(1 - CHANCE / 2, freedom))


def compare_order(ours: Mapping[str, Spread], published: Mapping[str, float], *, floor: float = 0.0) -> Order:
    """Compare our means with published figures of the same unit, over the rows that have both.

    A difference is beyond seed noise if Welch's test of unequal variances says so at 95 % (B. L. Welch, The
    generalization of Student's problem, 1947) and it exceeds `floor`: deviations of few seeds can be 0 by chance.
    """
    rows = [name for name in published if name in ours]
    pairs, num_tied = [], 0
    for first, second in combinations(rows, 2):
        if published[first] == published[second]:
            num_tied += 1
            continue
        if published[first] < published[second]:
            first, second = second, first
        error, bar = _noise(ours[first], ours[second], floor)
        pairs.append(
            Pair(
                better=first,
                worse=second,
                published=published[first] - published[second],
                ours=ours[first].mean - ours[second].mean,
                error=error,
                bar=bar,
            )
        )
    tau = kendall_tau([ours[name].mean for name in rows], [published[name] for name in rows])
    return Order(tuple(pairs), num_tied, tau)


def _noise(a: Spread, b: Spread, floor: float) -> tuple[float | None, float | None]:
    """Standard error of the difference of two means, and what a difference must exceed."""
    if a.error is None or b.error is None:
        return None, None
    error = math.hypot(a.error, b.error)
    if not error:
        return 0.0, None
    # Shares of the variance first: squares of tiny errors would vanish.
    shares = [(side / error) ** 2 for side in (a.error, b.error)]
    freedom = 1 / sum(share**2 / (one.count - 1) for share, one in zip(shares, (a, b), strict=True))
    return error, max(_t_quantile(freedom) * error, floor)


def table_bases(table: Table, rows: Sequence[ArmRuns]) -> dict[str, Spread | None]:
    """The baseline's figures as the runs of a table's rows measured them, in percent."""
    results = [result for one in rows if one.is_in(table) for result in one.results.values()]
    bases = {}
    for figure in table.figures:
        values = [base for result in results if (base := result.base(figure)) is not None]
        # On the same prefixes it is one measurement, repeated; it varies only with the prefixes.
        bases[figure] = spread(100 * value for value in (values if len(set(values)) > 1 else values[:1]))
    return bases


def table_orders(table: Table, rows: Sequence[ArmRuns]) -> dict[str, Order]:
    """For each figure of a table that two rows or more have, our order of them against the paper's."""
    orders = {}
    for figure in table.figures:
        ours, paper, nums = {}, {}, []
        for one in rows:
            found = one.spread(figure)
            if one.is_in(table) and found is not None and figure in one.row.paper:
                ours[one.row.name], paper[one.row.name] = found, one.row.paper[figure]
                nums += [result.num_behind(figure) for result in one.results.values()]
        if len(ours) > 1:
            # No difference below one prefix's share means anything.
            orders[figure] = compare_order(ours, paper, floor=100 / max(1, min(nums)))
    return orders


def all_pairs(orders: Iterable[Mapping[str, Order]]) -> Order:
    """The pairs of all tables and figures together; one that stands in several tables is counted once."""
    pairs = {(f, p.better, p.worse): p for found in orders for f, order in found.items() for p in order.pairs}
    return Order(tuple(pairs.values()), 0, None)


def standard_row(one: ArmRuns, rows: Sequence[ArmRuns]) -> ArmRuns | None:
    """Standard pretraining from the same beginning, if a run of it is there."""
    same = [r for r in rows if r.from_scratch == one.from_scratch and r.results]
    return next((r for r in same if r.cfg.objective.facts.learns_from is LearnsFrom.SAMPLES), None)


def alike_rows(rows: Sequence[ArmRuns], *, judge: set[str], candidates: set[str]) -> list[list[ArmRuns]]:
    """Judged rows in groups that differ in these settings of judge and candidates only."""
    groups: dict[str, list[ArmRuns]] = {}
    for one in rows:
        if one.is_judged:
            free: dict[str, Any] = {"out": True, "seed": True}
            free |= {"judge": judge, "candidates": {"__all__": candidates}}
            groups.setdefault(one.cfg.model_dump_json(exclude=free), []).append(one)
    return list(groups.values())


@dataclass(frozen=True)
class Loss:
    """What a row has lost by being trained by a judge and not by the truth, in percentage points, by figure."""

    judged: ArmRuns
    truth: ArmRuns
    figures: dict[str, tuple[float, float | None]]
    """Figure -> the truth's mean minus the judge's, and half of its 95 % interval (Welch); None of one seed."""


def losses_to_truth(rows: Sequence[ArmRuns], figures: Sequence[str]) -> list[Loss]:
    """Of each judged row that differs in the judge only from one that the world's truth has judged."""
    found = []
    for members in alike_rows(rows, judge={"backend", "local", "server"}, candidates=set()):
        truths = [one for one in members if one.cfg.judge.backend == "world"]
        for truth in truths[:1]:
            for one in members:
                if one.cfg.judge.backend == "world":
                    continue
                values = {}
                for figure in figures:
                    ours, theirs = one.spread(figure), truth.spread(figure)
                    if ours is not None and theirs is not None:
                        values[figure] = theirs.mean - ours.mean, _noise(theirs, ours, 0.0)[1]
                if values:
                    found.append(Loss(one, truth, values))
    return found


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b of two equally long sequences, in [-1, 1]; None where one of them has no order."""
    if min(len(set(a)), len(set(b))) < 2:
        return None
    return float(stats.kendalltau(a, b).statistic)
