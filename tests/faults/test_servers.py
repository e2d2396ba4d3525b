"""A judge's server that dies in mid-run, comes back late, or hangs: waited for, said, and the run saved."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from fault_server import FaultServer, rule_judge
from server_judges import Waits, failure, judge, several, value
from small_runs import STEPS, Ended, saved, start, train, wait


def test_a_server_that_has_answered_is_waited_for(capfd: pytest.CaptureFixture[str]) -> None:
    """It comes back after more than ten minutes, on the judge's clock, and far more attempts than max_retries."""
    waits = Waits()
    with FaultServer(rule_judge, ["ok"] + ["reset"] * 40 + ["ok"]) as server:
        found = judge(server, waits, max_retries=1, concurrency=1, batch_s=3600, backoff_s=0.5).judge(
            several(3)
        )
    assert len([value(one) for one in found]) == 3
    assert len(waits) == 40 and sum(waits) > 600
    said = capfd.readouterr().err
    assert (
        said.count("has answered before") == 1 and "judge.server" in said and said.count("answers again") == 1
    )


def test_the_wait_for_a_server_ends_with_the_batch() -> None:
    with FaultServer(rule_judge, ["ok", "reset"]) as server:
        found = judge(server, max_retries=1, batch_s=1, backoff_s=0.2, max_backoff_s=0.2).judge(several(3))
    assert value(found[0]) is not None
    assert all("no connection" in failure(one) or "deadline" in failure(one) for one in found[1:])


def options(server: FaultServer, **settings: object) -> list[object]:
    given = {"url": server.url, "model": "m", "backoff_s": 0.05, "max_backoff_s": 0.1, **settings}
    flags: list[object] = ["--judge.backend", "server", "--checkpoint.every", 0]
    for name, setting in given.items():
        flags += [f"--judge.server.{name}", setting]
    return flags


def run_against(folder: Path, fault: str, signum: int | None = None, **settings: object) -> Ended:
    """A run whose judge's server takes to `fault` when the first step is made; `signum` is sent to the run then."""
    records = folder / "run" / "metrics.jsonl"
    running: list[Any] = []

    def before(body: dict[str, Any]) -> None:
        if records.is_file() and '"loss"' in records.read_text():
            server._script[:] = [fault]
            if signum is not None and running:
                running.pop()[0].send_signal(signum)

    with FaultServer(rule_judge, before=before) as server:
        processes = start(folder, *options(server, **settings))
        running.append(processes)
        (ended,) = wait(processes)
    return ended


def ends_well(folder: Path) -> None:
    with FaultServer(rule_judge) as server:
        (ended,) = train(folder, *options(server))
    assert ended.code == 0 and saved(folder)[-1] == STEPS, ended.said


@pytest.mark.slow
def test_a_run_whose_server_dies_is_saved_before_it_leaves(tmp_path: Path) -> None:
    ended = run_against(tmp_path, "reset", batch_s=2)
    assert ended.code == 7 and saved(tmp_path) == [1], ended.said
    assert "waiting for it" in ended.said and "judge/failure_rate" in ended.said
    assert f"step 1 of {STEPS} is saved" in ended.said and "Traceback" not in ended.said
    ends_well(tmp_path)


@pytest.mark.slow
def test_a_signal_cuts_the_wait_for_a_server_short(tmp_path: Path) -> None:
    """It hangs, and would be waited for longer than the test's own patience."""
    ended = run_against(tmp_path, "hang", signal.SIGTERM, request_s=3000, batch_s=3000)
    assert ended.code == 75 and saved(tmp_path) == [1], ended.said


@pytest.mark.slow
@pytest.mark.faults
def test_a_server_that_lies_stops_the_run_saved(tmp_path: Path) -> None:
    ended = run_against(tmp_path, "say: I would rather not.")
    assert ended.code == 7 and saved(tmp_path) == [1] and "not a verdict" in ended.said, ended.said
    ends_well(tmp_path)
