"""Confidence intervals of evaluation figures: Wilson's for yes/no answers, a bootstrap over prefixes for the rest.

A figure is a ratio of sums over prefixes, sum(total) / sum(weight): totals are wins, scores or nats, weights the
answers or tokens they sum over. A prefix without an answer has weight 0.

Wilson's score interval (Wilson 1927) holds for independent yes/no answers and stays sensible at 0 and 1.
Everything else (graded scores, ties, losses, gains) gets the percentile bootstrap (Efron 1979): prefixes are drawn
anew with replacement; where all of them agree it has no width. Two policies on the same prefixes are drawn
together, so that what a prefix does to both cancels. Neither knows of anything but the choice of prefixes: not the
judge's noise, not the training seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from sip_engine.utils.errors import NonFiniteError

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000

Table = Mapping[str, np.ndarray]
"""Figure -> [n, 2] float64 totals and weights, one row a prefix, the same prefixes in every figure."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % confidence interval over the `n` prefixes that have an answer."""

    value: float
    low: float
    high: float
    n: int
    method: Literal["wilson", "bootstrap"]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of `n` > 0 independent yes/no answers."""
    from scipy.stats import binomtest  # heavy to load, and processes that measure losses only do without

    interval = binomtest(round(successes), n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def resampled(columns: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> np.ndarray:
    """[num_resamples, k] float64: sums of columns [n, k] over n rows drawn with replacement.

    The rows drawn depend on n and the seed only, so that figures of one evaluation stay paired.
    """
    n, draws = len(columns), np.random.default_rng(seed)
    counts = (np.bincount(draws.integers(0, n, n), minlength=n) for _ in range(num_resamples))
    return np.array([count @ columns for count in counts])


def ratio(sums: np.ndarray) -> float | None:
    """The figure of [n, 2] totals and weights; None without weight."""
    total, weight = sums.sum(axis=0)
    return float(total / weight) if weight else None


def estimates(table: Table) -> dict[str, Estimate]:
    """Every figure with its interval; figures without any weight are left out."""
    known = {name: sums for name, sums in table.items() if sums[:, 1].any()}
    graded = {name: sums for name, sums in known.items() if not _is_yes_or_no(sums)}
    drawn = _drawn_ratios(graded)
    found = {}
    for name, sums in known.items():
        value, n = ratio(sums), int((sums[:, 1] > 0).sum())
        assert value is not None
        if name in graded:
            found[name] = Estimate(value, *_central(drawn[name]), n, "bootstrap")
        else:
            found[name] = Estimate(value, *wilson(value * n, n), n, "wilson")
    return found


def relative_gains(ours: Table, base: Table) -> dict[str, Estimate]:
    """ours / base - 1 of every figure that both have and that is not 0 for the base; paired bootstrap."""
    return _compared(ours, base, lambda a, b: a / b - 1, base_may_be_zero=False)


def differences(ours: Table, base: Table) -> dict[str, Estimate]:
    """ours - base of every figure that both have; paired bootstrap."""
    return _compared(ours, base, lambda a, b: a - b, base_may_be_zero=True)


def pooled(parts: Sequence[np.ndarray]) -> Estimate | None:
    """The figure of several groups of prefixes taken as one: each group weighs as much as it has answers."""
    together = np.concatenate(parts) if parts else np.empty((0, 2))
    return estimates({"pooled": together}).get("pooled")


def _is_yes_or_no(sums: np.ndarray) -> bool:
    """Whether every prefix that has an answer has a whole yes or no, and all weigh the same."""
    answered = sums[sums[:, 1] > 0]
    weights = answered[:, 1]
    return bool((weights == weights[0]).all() and np.isin(answered[:, 0] / weights, (0.0, 1.0)).all())


def _drawn_ratios(table: Table) -> dict[str, np.ndarray]:
    """[NUM_RESAMPLES] resampled values of every figure; not finite where the drawn prefixes have no weight."""
    if not table:
        return {}
    drawn = resampled(np.concatenate(list(table.values()), axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = drawn[:, 0::2] / drawn[:, 1::2]
    return dict(zip(table, values.T, strict=True))


def _central(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise NonFiniteError("a figure of the evaluation is not finite: start from an older checkpoint")
    low, high = np.quantile(finite, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _compared(
    ours: Table, base: Table, compare: Callable[[Any, Any], Any], *, base_may_be_zero: bool
) -> dict[str, Estimate]:
    both = {}
    for name in ours.keys() & base.keys():
        ours_value, base_value = ratio(ours[name]), ratio(base[name])
        if ours_value is not None and base_value is not None and (base_value or base_may_be_zero):
            both |= {f"ours {name}": ours[name], f"base {name}": base[name]}
    drawn = _drawn_ratios(both)
    found = {}
    for name in ours:
        if f"ours {name}" not in both:
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            values = compare(drawn[f"ours {name}"], drawn[f"base {name}"])
        value = compare(ratio(ours[name]), ratio(base[name]))
        n = int(((ours[name][:, 1] > 0) & (base[name][:, 1] > 0)).sum())
        found[name] = Estimate(value, *_central(values), n, "bootstrap")
    return found
