"""Intervals against closed forms: Wilson's equation, moments of the bootstrap, exact pairing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sip_engine.evaluation.intervals import (
    differences,
    estimates,
    pooled,
    ratio,
    relative_gains,
    resampled,
    wilson,
)

Z = 1.959963984540054


def sums(values: list[float] | np.ndarray, weight: float = 1.0) -> np.ndarray:
    """One answer of this weight a prefix; NaN is no answer."""
    values = np.asarray(values, float)
    known = ~np.isnan(values)
    return np.stack([np.where(known, values, 0.0) * weight, known * weight], axis=1)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_solves_its_equation(n: int, share: float) -> None:
    """The ends are the shares p for which |observed - p| is z standard errors of p itself."""
    successes = round(share * n)
    for end in wilson(successes, n):
        if 0.0 < end < 1.0:
            assert abs(successes / n - end) == pytest.approx(
                Z * math.sqrt(end * (1 - end) / n), rel=1e-6, abs=1e-7
            )
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1 and high - low > 0


def test_wilson_known_values() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148 and 0 of 20."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_resampled_sums_have_the_bootstraps_moments() -> None:
    """Sum of n draws with replacement: mean n * mean, covariance n * (population) covariance."""
    columns = np.random.default_rng(1).normal(size=(37, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    drawn = resampled(columns, num_resamples=20_000)
    assert drawn.shape == (20_000, 2)
    covariance = 37 * np.cov(columns.T, bias=True)
    np.testing.assert_allclose(
        drawn.mean(axis=0), columns.sum(axis=0), atol=4 * math.sqrt(covariance.max() / 2e4)
    )
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.05 * covariance.max())


def test_graded_figures_get_the_intervals_of_their_standard_error() -> None:
    rng = np.random.default_rng(2)
    values, weights = rng.beta(4, 2, 900), rng.integers(5, 15, 900)
    scores = estimates({"a": sums(values)})["a"]
    half = Z * values.std() / math.sqrt(900)
    assert (scores.method, scores.n, scores.value) == ("bootstrap", 900, pytest.approx(values.mean()))
    assert (scores.low, scores.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )
    # A ratio of sums, as a loss over tokens is: its error by linearisation.
    totals = values * weights + rng.normal(size=900)
    loss = estimates({"a": np.stack([totals, weights], axis=1)})["a"]
    value = totals.sum() / weights.sum()
    half = Z * (totals - value * weights).std() / weights.mean() / math.sqrt(900)
    assert loss.value == pytest.approx(value)
    assert (loss.low, loss.high) == pytest.approx((value - half, value + half), abs=0.1 * half)


def test_yes_or_no_figures_get_wilsons() -> None:
    answers = [1.0] * 8 + [0.0] * 2
    for weight in (1.0, 2.0):  # one answer a prefix, or the same answer in both orders
        found = estimates({"a": sums([*answers, math.nan], weight)})["a"]
        assert (found.method, found.n, found.value) == ("wilson", 10, 0.8)
        assert (found.low, found.high) == wilson(8, 10)
    assert estimates({"a": sums([*answers, 0.5])})["a"].method == "bootstrap"
    uneven = np.array([[2.0, 2.0], [0.0, 1.0], [1.0, 1.0]])
    assert estimates({"a": uneven})["a"].method == "bootstrap"


def test_unanswered_prefixes_count_for_nothing() -> None:
    rng = np.random.default_rng(3)
    values = rng.beta(2, 2, 300)
    found = estimates(
        {"some": sums(np.where(np.arange(300) % 3, values, math.nan)), "none": sums([math.nan] * 300)}
    )
    kept = values[np.arange(300) % 3 != 0]
    assert set(found) == {"some"} and found["some"].n == 200
    assert found["some"].value == pytest.approx(kept.mean())
    half = Z * kept.std() / math.sqrt(200)
    assert found["some"].high - found["some"].low == pytest.approx(2 * half, rel=0.1)
    assert ratio(sums([math.nan])) is None


def test_gains_are_paired() -> None:
    """What is the same on every prefix has no error, however much the prefixes differ."""
    base = np.random.default_rng(4).beta(1, 1, 200)
    gain = relative_gains({"a": sums(base * 1.1), "b": sums(base)}, {"a": sums(base)})
    assert set(gain) == {"a"}
    assert (gain["a"].value, gain["a"].low, gain["a"].high) == pytest.approx((0.1, 0.1, 0.1))
    shift = differences({"a": sums(base + 0.25)}, {"a": sums(base)})["a"]
    assert (shift.value, shift.low, shift.high) == pytest.approx((0.25, 0.25, 0.25))


def test_gains_of_independent_figures_have_both_errors() -> None:
    rng = np.random.default_rng(5)
    ours, base = rng.normal(3, 1, 1000), rng.normal(2, 1, 1000)
    gain = relative_gains({"a": sums(ours)}, {"a": sums(base)})["a"]
    value = ours.mean() / base.mean() - 1
    half = Z * (ours - (value + 1) * base).std() / base.mean() / math.sqrt(1000)
    assert gain.value == pytest.approx(value)
    assert (gain.low, gain.high) == pytest.approx((value - half, value + half), abs=0.1 * half)


def test_no_gain_over_nothing() -> None:
    assert relative_gains({"a": sums([1.0, 0.5])}, {"a": sums([0.0, 0.0])}) == {}
    assert differences({"a": sums([1.0, 0.5])}, {"a": sums([0.0, 0.0])})["a"].value == 0.75
    assert relative_gains({"a": sums([1.0])}, {"a": sums([math.nan])}) == {}


def test_pooling_weighs_groups_by_their_answers() -> None:
    found = pooled([sums([1.0, 1.0, 1.0, 0.0]), sums([0.0])])
    assert found is not None and (found.value, found.n, found.method) == (0.6, 5, "wilson")
    assert pooled([]) is None and pooled([sums([math.nan])]) is None
