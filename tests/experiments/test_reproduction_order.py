"""Figures over seeds against plain statistics, and the order of rows against a count by hand."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sip_engine.config.schema import RunConfig
from sip_engine.experiments.reproduction.plan import Arm, FigureName, Table
from sip_engine.experiments.reproduction.statistics import (
    ArmRuns,
    Cost,
    Order,
    Result,
    Spread,
    alike_rows,
    all_pairs,
    compare_order,
    kendall_tau,
    spread,
    standard_row,
    table_bases,
    table_orders,
)

NO_COST = Cost(
    steps=1, step_seconds=0, seconds={}, elapsed=0, peak_memory_mb=0, joules_per_step=None, judge={}
)
SETTINGS: dict[str, Any] = {"world": {}}
samples = st.lists(st.integers(-50, 50).map(float), min_size=2, max_size=9)


def a_row(
    name: str,
    figures: list[dict[str, float]],
    *,
    paper: dict[FigureName, float] | None = None,
    baseline: dict[str, float] | None = None,
    table: str = "main",
    also: tuple[str, ...] = (),
    **settings: Any,
) -> ArmRuns:
    """A row with one result a seed."""
    results = {
        seed: Result(figures=found, baseline=baseline or {}, num_prefixes=9, cost=NO_COST)
        for seed, found in enumerate(figures)
    }
    row = Arm(name=name, label=name.upper(), table=table, also=also, paper=paper or {})
    return ArmRuns(row, RunConfig.model_validate(SETTINGS | settings), results, {}, len(figures))


@given(st.lists(st.floats(-100, 100), max_size=8))
def test_spread_against_the_standard_library(values):
    found = spread(values)
    if not values:
        assert found is None
        return
    assert found is not None and found.count == len(values)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    if len(values) == 1:
        assert found.deviation is None and found.error is None
    else:
        assert found.deviation == pytest.approx(statistics.stdev(values), abs=1e-9)
        assert found.error == pytest.approx(statistics.stdev(values) / len(values) ** 0.5, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=9))
def test_kendall_tau_against_the_correlation_of_signs(pairs):
    """tau-b is the correlation of two antisymmetric matrices of signs (Kendall's general coefficient)."""
    a, b = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    signs = [np.sign(np.subtract.outer(values, values)) for values in (a, b)]
    norm = np.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
    found = kendall_tau(a, b)
    if norm == 0:
        assert found is None
    else:
        assert found == pytest.approx((signs[0] * signs[1]).sum() / norm)


def test_pairs_are_alike_the_other_way_or_undecided():
    """Standard errors of 1 each, 6 degrees of freedom: a difference must be above 2.447 * sqrt(2) = 3.46."""
    one = {name: Spread(mean, 2.0, 4) for name, mean in {"a": 10, "b": 6.5, "c": 9, "d": 20}.items()}
    order = compare_order(one, {"a": 50.0, "b": 40.0, "c": 30.0, "d": 20.0, "not run": 99.0})
    clear = {(p.better, p.worse): p.ours for p in order.alike}
    assert clear == {("a", "b"): 3.5}
    assert {(p.better, p.worse): p.ours for p in order.reversed} == {
        ("a", "d"): -10.0,
        ("b", "d"): -13.5,
        ("c", "d"): -11.0,
    }
    assert {(p.better, p.worse): p.ours for p in order.undecided} == {("a", "c"): 1.0, ("b", "c"): -2.5}
    assert [(p.better, p.worse) for p in order.other_way] == [("b", "d"), ("c", "d"), ("a", "d"), ("b", "c")]
    assert {(p.better, p.worse) for p in order.agreeing} == {("a", "b"), ("a", "c")}
    assert {p.published for p in order.pairs} == {10.0, 20.0, 30.0}
    assert all(p.error == pytest.approx(2**0.5) for p in order.pairs)
    assert all(p.bar == pytest.approx(2.446912 * 2**0.5) for p in order.pairs)
    assert order.tau == pytest.approx((2 - 4) / 6)
    assert (order.num_tested, order.by_chance) == (6, pytest.approx(0.3))


def beyond(t: float, freedom: float) -> float:
    """Two-sided p-value of Student's t by Simpson's rule over its density."""
    x = np.linspace(0.0, t, 4001)
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(scale - (freedom + 1) / 2 * np.log1p(x * x / freedom))
    weights = np.tile([2.0, 4.0], 2001)[:4001]
    weights[[0, -1]] = 1.0
    return 1 - 2 * float(weights @ density) * t / 4000 / 3


@given(samples, samples)
@example([-10.0, 10.0], [60.0] * 9)  # one degree of freedom, not nine
def test_beyond_noise_is_welchs_test_of_the_seeds(a, b):
    """By a p-value integrated here, of the seeds themselves."""
    rows = {
        name: Spread(statistics.fmean(x), statistics.stdev(x), len(x)) for name, x in (("a", a), ("b", b))
    }
    (pair,) = compare_order(rows, {"a": 2.0, "b": 1.0}).pairs
    first, second = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if first + second == 0:
        assert pair.bar is None and not pair.is_beyond_noise
        return
    freedom = (first + second) ** 2 / (first**2 / (len(a) - 1) + second**2 / (len(b) - 1))
    t = abs(statistics.fmean(a) - statistics.fmean(b)) / (first + second) ** 0.5
    assert pair.error == pytest.approx((first + second) ** 0.5)
    probability = beyond(t, freedom)
    if abs(probability - 0.05) > 1e-6:
        assert pair.is_beyond_noise == (probability < 0.05)


def test_margin_is_half_of_the_interval_of_the_mean():
    """At 2 degrees of freedom the quantile has a closed form: 0.95 * sqrt(2 / (1 - 0.95**2))."""
    one = spread([3.0, 4.5, 8.0])
    wanted = 0.95 * (2 / (1 - 0.95**2)) ** 0.5 * statistics.stdev([3.0, 4.5, 8.0]) / 3**0.5
    assert one is not None and one.margin == pytest.approx(wanted, rel=1e-9)
    assert Spread(1.0, None, 1).margin is None


def test_one_seed_is_undecided_and_one_prefix_says_nothing():
    rows = {"a": Spread(2.0, 2.0, 4), "b": Spread(0.0, 0.0, 4), "c": Spread(-50.0, None, 1)}
    order = compare_order(rows, {"a": 3.0, "b": 2.0, "c": 1.0})
    assert len(order.undecided) == 3
    assert [p.error for p in order.pairs] == [1.0, None, None]
    assert [p.bar for p in order.pairs] == [pytest.approx(3.182446), None, None]
    assert (order.num_tested, order.by_chance) == (1, 0.05)
    assert len(compare_order({**rows, "a": Spread(3.19, 2.0, 4)}, {"a": 3.0, "b": 2.0}).alike) == 1
    # With hardly a deviation there is the floor; 100 * 152 / 300 is one prefix of 300 above 151. Seeds that all
    # agree say nothing: two or three do by chance.
    share = 100 / 300
    for more, deviation, beyond in ((0, 1e-9, 0), (1, 1e-9, 0), (1.5, 1e-9, 1), (1.5, 0.0, 0)):
        means = {
            "a": Spread(100 * (151 + more) / 300, deviation, 3),
            "b": Spread(100 * 151 / 300, deviation, 3),
        }
        order = compare_order(means, {"a": 2.0, "b": 1.0}, floor=share)
        assert (len(order.alike), order.num_tested) == (beyond, int(deviation > 0))


def test_floor_of_a_table_is_a_share_of_its_fewest_prefixes():
    table = Table(name="main", title="", figures=("win_rate",))
    rows = [
        a_row(name, [{"win_rate": mean}, {"win_rate": mean + 1e-9}], paper={"win_rate": paper})
        for name, mean, paper in (("a", 0.75, 3.0), ("b", 0.65, 2.0), ("c", 0.5, 1.0))
    ]
    found = table_orders(table, rows)["win_rate"]
    assert [p.bar for p in found.pairs] == [pytest.approx(100 / 9)] * 3
    assert {(p.better, p.worse) for p in found.alike} == {("a", "c"), ("b", "c")}


def test_floor_of_figures_of_safe_prefixes_is_one_of_those():
    table = Table(name="main", title="", figures=("win_rate_safe",))
    rows = [
        a_row(name, [{"win_rate_safe": mean}, {"win_rate_safe": mean + 1e-9}], paper={"win_rate_safe": mean})
        for name, mean in (("a", 0.75), ("b", 0.5))
    ]
    (pair,) = table_orders(table, rows)["win_rate_safe"].pairs
    assert pair.bar == pytest.approx(100 / 9)
    for one in rows:
        for seed, result in one.results.items():
            one.results[seed] = result.model_copy(update={"num_safe_prefixes": 4})
    (pair,) = table_orders(table, rows)["win_rate_safe"].pairs
    assert pair.bar == pytest.approx(100 / 4) and not pair.is_beyond_noise


def test_pairs_that_the_paper_ties_are_only_counted():
    ours = {"a": Spread(3.0, 1e-3, 2), "b": Spread(2.0, 1e-3, 2), "c": Spread(1.0, 1e-3, 2)}
    order = compare_order(ours, {"a": 5.0, "b": 5.0, "c": 4.0})
    assert (len(order.pairs), order.num_tied, len(order.alike)) == (2, 1, 2)
    assert order.tau == pytest.approx(2 / (3 * 2) ** 0.5)


def test_gains_are_of_each_seed_over_its_own_baseline():
    row = a_row("r", [{"safety": 0.6, "win_rate": 0.75}, {"safety": 0.9}], baseline={"safety": 0.5})
    gain = row.spread("safety", relative=True)
    assert gain is not None and gain.mean == pytest.approx(50.0)
    assert gain.deviation == pytest.approx(statistics.stdev([20.0, 80.0]))
    over_itself = row.spread("win_rate", relative=True)
    assert over_itself is not None and over_itself.mean == pytest.approx(50.0)
    assert row.spread("factuality") is None
    plain = row.spread("win_rate")
    assert plain is not None and (plain.mean, plain.count) == (75.0, 1)


def test_orders_of_a_table_take_its_rows_and_all_pairs_count_each_once():
    figures = ("win_rate", "safety")
    main, other = (
        Table(name="main", title="", figures=figures),
        Table(name="other", title="", figures=figures),
    )
    rows = [
        a_row("a", [{"win_rate": 0.9}, {"win_rate": 0.9001}], paper={"win_rate": 80.0}, also=("other",)),
        a_row(
            "b",
            [{"win_rate": 0.5}, {"win_rate": 0.5001}],
            paper={"win_rate": 60.0, "safety": 1.0},
            table="other",
        ),
        a_row("c", [{"win_rate": 0.2}, {"win_rate": 0.2001}], paper={"win_rate": 70.0}, also=("other",)),
        a_row("d", [{"win_rate": 0.3}, {"win_rate": 0.3}]),
        a_row("e", [], paper={"win_rate": 1.0}),
    ]
    orders = [table_orders(table, rows) for table in (main, other)]
    assert [list(found) for found in orders] == [["win_rate"], ["win_rate"]]
    assert [[(p.better, p.worse) for p in found["win_rate"].pairs] for found in orders] == [
        [("a", "c")],
        [("a", "b"), ("a", "c"), ("c", "b")],
    ]
    total = all_pairs(orders)
    assert len(total.pairs) == 3
    assert [(p.better, p.worse) for p in total.reversed] == [("c", "b")]
    assert all_pairs([]) == Order((), 0, None)


def test_baseline_measured_once_has_no_deviation():
    table = Table(name="main", title="", figures=("win_rate", "safety", "factuality"))
    same = a_row("a", [{}, {}], baseline={"safety": 0.7})
    assert table_bases(table, [same]) == {
        "win_rate": Spread(50.0, None, 1),
        "safety": Spread(70.0, None, 1),
        "factuality": None,
    }
    elsewhere = a_row("b", [{}], baseline={"safety": 0.2}, table="other")
    varied = a_row("c", [{}], baseline={"safety": 0.8})
    found = table_bases(table, [same, elsewhere, varied])["safety"]
    assert found is not None and (found.mean, found.count) == (pytest.approx(220 / 3), 3)


def test_standard_row_begins_alike():
    plain: dict[str, Any] = {"objective": {"kind": "next_token"}}
    rows = [
        a_row("not_run", [], init="base", **plain),
        a_row("continual", [{}], init="base", **plain),
        a_row("scratch", [{}], **plain),
    ]
    dpo, fresh = a_row("dpo", [{}], init="base"), a_row("fresh", [{}])
    found = [standard_row(one, [*rows, dpo, fresh]) for one in (dpo, fresh)]
    assert [one.row.name for one in found if one] == ["continual", "scratch"]
    assert standard_row(fresh, rows[:2]) is None
    assert (fresh.title, dpo.title) == ("FRESH, from scratch", "DPO")


def test_rows_are_grouped_by_all_but_the_named_settings():
    rows = [
        a_row("2", [], candidates=[{"rollouts": 2}], seed=1),
        a_row("8", [], candidates=[{"rollouts": 8}], out="elsewhere"),
        a_row("pivot", [], candidates=[{"rollouts": 8}], judge={"schedule": "pivot"}),
        a_row("alone", [], candidates=[{"rollouts": 8, "original": False}]),
        a_row("longer", [], candidates=[{"rollouts": 4}], steps=7),
        a_row("unjudged", [], candidates=[{"rollouts": 8}], objective={"kind": "sft_rollout"}),
    ]
    names = [
        [one.row.name for one in group] for group in alike_rows(rows, judge=set(), candidates={"rollouts"})
    ]
    assert names == [["2", "8"], ["pivot"], ["alone"], ["longer"]]
    names = [
        [one.row.name for one in group] for group in alike_rows(rows, judge={"schedule"}, candidates=set())
    ]
    assert names == [["2"], ["8", "pivot"], ["alone"], ["longer"]]
