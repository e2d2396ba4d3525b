"""The report of runs that are going on, were requeued or have died: starts, gaps, steps made again, rows by rank."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from sip_engine.monitoring.load import load_runs
from sip_engine.report.html import write_report
from sip_engine.report.speed import speed_table
from sip_engine.report.tables import overview
from sip_engine.report.timeline import timelines
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_json, write_jsonl

ZERO = 1_790_000_000.0


def a_run(folder: Path, ends: list[dict | None], *, ranks: int = 2) -> Path:
    """Starts an hour apart of which each makes three steps of a minute; what is in `ends` is how they ended.

    Of a start without an end the last step was not saved: the next one begins two steps on.
    """
    folder.mkdir()
    sessions, metrics, rows, step = [], {}, {rank: [] for rank in range(ranks)}, 0
    for number, end in enumerate(ends):
        began = ZERO + 3600 * number
        sessions.append({"began": began, "step": step, "host": "n0", "pid": 1, "ranks": ranks})
        for made in range(1, 4):
            metrics[step + made] = {
                "step": step + made,
                "loss": 1.0,
                "machine/tokens_per_second": 100.0 * made,
            }
            for rank in range(ranks):
                spans = [
                    ["data", 0, 1],
                    ["generate", 1, 20 + 10 * rank],
                    ["update", 40, 5],
                    ["exchange", 45, 5],
                ]
                rows[rank].append(
                    {"step": step + made, "at": began + 60 * made, "spans": spans, "host": f"n{rank}"}
                )
        step += 2 if end is None else 3
        if end is not None:
            sessions.append({"ended": began + 300, "step": step, **end})
    write_jsonl(folder / "sessions.jsonl", sessions)
    write_jsonl(folder / "metrics.jsonl", list(metrics.values()))
    write_json(folder / "config.json", {"steps": 20})
    (folder / "timeline").mkdir()
    for rank in range(ranks):
        write_jsonl(folder / "timeline" / f"rank_{rank}.jsonl", rows[rank])
    return folder


def test_a_requeued_run_that_died_shows_its_gaps(tmp_path: Path) -> None:
    run = a_run(
        tmp_path / "run", [{"how": "preempted", "code": 75}, None, {"how": "failed: no disk", "code": 3}]
    )
    (shown,) = timelines(load_runs([run]))
    first, second, third = shown.starts
    assert (first.steps, first.gap, first.again, first.ended) == ("0 → 3", "–", "–", "preempted")
    assert (second.steps, second.gap) == ("3 → 6", "55 min 0 s") and "left no end" in second.ended
    # The second was last seen 230 s after its begin, with one step more than the third began with.
    assert (third.steps, third.again, third.ended) == ("5 → 8", "1", "failed: no disk")
    assert third.gap == "56 min 10 s" and second.worked == "3 min 50 s"
    assert shown.state == "failed: no disk"
    assert "rank 1 (n1)" in shown.slowest and "most of the difference in generate" in shown.slowest
    starts, rows = shown.plot.panels
    assert "start 3: hours 2.00 to 2.08" in starts.svg
    assert rows.heading == "steps 6 to 8 by rank, seconds"  # those of the last start only
    assert (
        "rank 0: data 3.00 s, generate 60.00 s" in rows.svg
        and "rank 1: data 3.00 s, generate 90.00 s" in rows.svg
    )


def test_a_run_that_is_at_work_and_one_that_is_dead(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", [None])
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (going,) = load_runs([run])
    (dead,) = load_runs([run])
    assert (
        timelines([going])[0].starts[0].ended == "running" and timelines([dead])[0].starts[0].ended == "dead"
    )
    assert overview([going])[0].progress == "3 of 20 steps (running)"
    page = write_report([run], tmp_path / "r.html", title="r").read_text()
    assert "run – dead" in page and "Speed and cost" in page


def test_of_many_ranks_the_slowest_is_among_those_drawn(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", [None], ranks=40)
    (shown,) = timelines(load_runs([run]))
    svg = shown.plot.panels[1].svg
    assert svg.count("rank 39") >= 1 and 10 <= svg.count(": data 3.00 s") <= 17


def test_what_is_not_measured_is_said_to_be_so(tmp_path: Path) -> None:
    table = dict(speed_table(load_runs([a_run(tmp_path / "run", [None])])))
    assert table["tokens written and trained on, a second"] == ("300",)
    assert table["model FLOPs utilisation"] == table["energy a step by NVML, kJ"] == ("n/a",)
    assert speed_table([]) == []


@pytest.mark.parametrize("row", ['{"step": 1}', '{"step": 1, "at": 0, "spans": [["data"]]}', "[]"])
def test_a_damaged_timeline_is_one_line(row: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", [None])
    (run / "timeline" / "rank_0.jsonl").write_text(row + "\n")
    with pytest.raises(DataError, match="rank_0"):
        load_runs([run])
