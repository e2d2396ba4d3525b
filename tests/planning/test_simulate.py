"""The simulation against closed forms: Daly's goodput and interval, the largest of normal draws, rate limits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from sip_engine.cli import main
from sip_engine.planning.simulate.closed_forms import daly_interval, expected_goodput, young_interval
from sip_engine.planning.simulate.model import simulate
from sip_engine.planning.simulate.scenario import Scenario, scenario_of_run
from sip_engine.planning.simulate.study import at_scales, best_interval, breaks_at, by_interval
from sip_engine.utils.errors import ConfigError, DataError

CALM = Scenario(
    gpus=8, gpus_per_node=8, generate_s=10.0, judge_s=0.0, update_s=0.0, save_every=1, failures_per_gpu_hour=0.0,
    straggler_spread=0.0, judge_latency_spread=0.0,
)  # fmt: skip
STORMY = replace(CALM, failures_per_gpu_hour=0.45, restart_s=60.0, save_stall_s=5.0)
"""A failure every 1,000 s."""


@pytest.mark.parametrize("steps", [2, 10, 40])
def test_goodput_with_failures_is_dalys(steps: int) -> None:
    """Saves that stop the loop, restarts that can fail too: 1,500 failures, within three parts in a hundred."""
    found = simulate(replace(STORMY, save_every=steps), seconds=1.5e6, seed=1)
    assert found.failures == pytest.approx(1500, rel=0.08)
    assert found.goodput == pytest.approx(expected_goodput(10.0 * steps, 5.0, 60.0, 1000.0), rel=0.03)


def test_the_best_interval() -> None:
    """Daly's estimate beside the exact optimum, and the simulated goodput around it."""
    exact = optimize.minimize_scalar(
        lambda x: -expected_goodput(x, 5.0, 60.0, 1000.0), bounds=(1.0, 1000.0), method="bounded"
    ).x
    assert daly_interval(5.0, 1000.0) == pytest.approx(exact, rel=0.01)
    assert young_interval(5.0, 1000.0) == pytest.approx(100.0)
    assert daly_interval(5000.0, 1000.0) == 1000.0
    points = by_interval(replace(STORMY, generate_s=1.0), seed=2)
    best = max(points, key=lambda point: point[1])[0]
    assert best_interval(replace(STORMY, generate_s=1.0)) == pytest.approx(exact, rel=0.01)
    assert exact / 2.1 <= best <= exact * 2.1
    for _, simulated, closed_form in points:
        assert simulated == pytest.approx(closed_form, abs=0.06)


def test_a_save_that_goes_on_meanwhile_costs_its_stall_alone() -> None:
    stopped = simulate(replace(CALM, save_stall_s=5.0), seconds=1.5e4)
    written = simulate(replace(CALM, save_stall_s=1.0, save_write_s=4.0), seconds=1.1e4)
    assert (stopped.steps, written.steps) == (1000, 1000)
    # Longer to write than to the next save: the loop waits for the storage.
    late = simulate(replace(CALM, save_stall_s=1.0, save_write_s=20.0), seconds=2.1e4)
    assert late.steps == pytest.approx(1000, abs=2)
    # What a failure finds unwritten is lost: as many steps again as pass in writing.
    failing = replace(STORMY, save_stall_s=0.0, save_write_s=9.0)
    slow, fast = (simulate(replace(failing, save_write_s=s), seconds=3e5, seed=3) for s in (9.0, 0.0))
    assert slow.lost_steps > fast.lost_steps and slow.goodput < fast.goodput


def test_a_step_waits_for_its_slowest_node() -> None:
    """E max of n log-normals, by 200,000 draws."""
    nodes, spread = 64, 0.1
    draws = np.exp(spread * np.random.default_rng(0).standard_normal((3000, nodes)).max(axis=1))
    cfg = replace(CALM, gpus=8 * nodes, straggler_spread=spread, save_every=10**6)
    found = simulate(cfg, seconds=3e4 * draws.mean(), seed=4)
    assert found.steps == pytest.approx(3000, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 10.0 + 8.0 + 2.0),
        # Four chunks: three of them are judged under the generation of the next ones.
        ({"chunks": 4}, 10.0 + 2.0 + 2.0),
        # A judge slower than the sampler: its work is the step, after the first chunk.
        ({"chunks": 4, "judge_s": 40.0}, 2.5 + 40.0 + 2.0),
        ({"chunks": 4, "judge_shared": True}, 10.0 + 8.0 + 2.0),
        ({"calls": 1000, "rate_limit": 50.0}, 10.0 + 20.0 + 2.0),
        ({"calls": 10, "judge_latency_s": 30.0}, 10.0 + 30.0 + 2.0),
    ],
)
def test_what_a_step_takes_by_hand(changes: dict[str, float], seconds: float) -> None:
    step = replace(CALM, **{"judge_s": 8.0, "update_s": 2.0, "save_every": 10**6} | changes)
    found = simulate(step, seconds=seconds * 100 + 1e-6)
    assert found.steps == 100 and step.step_s == pytest.approx(seconds)
    waited = 0.0 if step.judge_shared else found.seconds["judge"] / found.elapsed
    assert found.goodput + waited == pytest.approx(1.0, rel=1e-6)


def test_scales_and_where_it_breaks() -> None:
    def scenario_of(gpus: int) -> Scenario | None:
        return None if gpus < 64 else replace(CALM, gpus=gpus, failures_per_gpu_hour=0.01, save_stall_s=30.0)

    found = at_scales(scenario_of, seconds=1e5, seed=5, scales=(8, 64, 4096))
    assert [one.scenario.gpus for one in found] == [64, 4096]
    assert found[0].outcome.goodput > found[1].outcome.goodput
    assert breaks_at(found).startswith("4096 GPUs: goodput")
    assert breaks_at(found, least=0.0) == "goodput stays above 0% up to 4096 GPUs"
    assert math.isinf(best_interval(CALM)) and by_interval(CALM, seed=0) == []


def test_a_runs_own_times(tmp_path: Path) -> None:
    rows = [
        {"step": n, "seconds/generate": 2.0, "seconds/judge": 0.5, "seconds/update": 1.0 + n}
        for n in range(2)
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [{"step": 0, "eval/loss": 1.0}, *rows])
    )
    found = scenario_of_run(tmp_path)
    assert (found.generate_s, found.judge_s, found.update_s) == (2.0, 0.5, 1.5)
    assert simulate(found, seconds=400.0 + 1e-6).steps == 100
    with pytest.raises(DataError, match="no records"):
        scenario_of_run(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--failures", "-1"], "--failures -1"),
        (["--rate-limit", "0"], "--rate-limit 0"),
        (["--hours", "0"], "--hours 0"),
        (["--nodes", "0"], "--nodes 0"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["simulate", "configs/paper/scratch_next_token.toml", "--out", str(tmp_path / "out"), *options])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and words in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "simulate",
            "configs/paper/scratch_next_token.toml",
            "--out",
            str(tmp_path / "out"),
            "--hours",
            "0.1",
        ]
    )
    written = json.loads((tmp_path / "out" / "simulate.json").read_text())
    assert written["simulation"] is True
    assert [one["gpus"] for one in written["scales"]] == [8 * 2**n for n in range(10)]
    assert "where it breaks" in capsys.readouterr().out
    for name in ("goodput_by_scale", "goodput_by_interval"):
        assert (tmp_path / "out" / f"{name}.svg").read_text().count("<svg") == 1
    with pytest.raises(ConfigError):
        simulate(replace(CALM, generate_s=0.0), seconds=1.0)
