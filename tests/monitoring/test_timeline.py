"""What a run leaves of when it did what: timeline, starts and states, `sip runs`, `sip trace`, a profile."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from command_line import Sip, fails
from world_runs import run_config

from sip_engine.distributed.mesh import Mesh
from sip_engine.monitoring.listing import list_runs
from sip_engine.monitoring.sessions import read_sessions, session
from sip_engine.monitoring.timeline import read_timeline
from sip_engine.monitoring.trace import slowest
from sip_engine.train import train
from sip_engine.utils.errors import ConfigError, DataError, Stopped
from sip_engine.utils.files import lock_folder, release_folder, write_json, write_jsonl


def a_folder(folder: Path, *sessions: dict, step: int = 3, steps: int = 6, **rows: float) -> Path:
    """What a run of `steps` left, of which `step` were made."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"steps": steps})
    write_jsonl(folder / "metrics.jsonl", [{"step": n, "loss": 1 / n, **rows} for n in range(1, step + 1)])
    if sessions:
        write_jsonl(folder / "sessions.jsonl", sessions)
    return folder


BEGAN = {"began": 100.0, "step": 0, "host": "n1", "pid": 1, "ranks": 2}


def ended(how: str, code: int, step: int = 3) -> dict:
    return {"ended": 200.0, "step": step, "how": how, "code": code}


def test_states_by_what_a_folder_holds(tmp_path: Path) -> None:
    a_folder(tmp_path / "finished", BEGAN, ended("finished", 0, 6), step=6)
    a_folder(tmp_path / "preempted", BEGAN, ended("preempted", 75))
    a_folder(tmp_path / "failed", BEGAN, ended("failed: no luck", 7))
    dead = a_folder(tmp_path / "dead", BEGAN)
    (dead / ".lock").touch()  # stays behind where a process was killed
    (dead / "crash").mkdir()
    (dead / "crash" / "rank_1.txt").write_text("when\nrank 0 is gone\n\n")
    a_folder(tmp_path / "old")
    a_folder(tmp_path / "old_finished", step=6)
    going = a_folder(
        tmp_path / "sub" / "going", BEGAN, ended("preempted", 75), {**BEGAN, "began": 300.0, "step": 3}
    )
    damaged = a_folder(tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text("{]\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")  # a model's, no run
    with (going / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        states = {run.name: run.state for run in list_runs(tmp_path)}
    assert states.pop("damaged").startswith("damaged: ")
    assert states == {
        "finished": "finished",
        "preempted": "preempted, to be started again",
        "failed": "failed: no luck",
        "dead": "dead: rank 0 is gone",
        "old": "stopped",
        "old_finished": "finished",
        "sub/going": "running, start 2",
    }
    assert {run.name: run.state for run in list_runs(tmp_path)}["sub/going"] == "dead"


def test_to_look_at_a_run_takes_its_folder_from_nobody(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "run", BEGAN)
    with (folder / ".lock").open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert lock_folder(folder) is None  # held for good
    lock = lock_folder(folder)
    assert lock is not None
    assert list_runs(tmp_path)[0].state == "running"
    release_folder(folder, lock)


def test_how_a_start_ends_is_written_down(tmp_path: Path) -> None:
    ends = (
        (None, "finished", 0),
        (Stopped(15), "preempted", 75),
        (Stopped(2), "interrupted", 130),
        (DataError("two\nlines"), "failed: two lines", 3),
        (ZeroDivisionError("x"), "failed: ZeroDivisionError: x", 1),
    )
    steps = iter(range(100))
    for number, (error, how, code) in enumerate(ends):
        with (
            suppress(Stopped, DataError, ZeroDivisionError),
            session(tmp_path, 2, steps.__next__, enabled=True),
        ):
            if error is not None:
                raise error
        last = read_sessions(tmp_path)[-1]
        assert (last.how, last.code, last.from_step, last.step) == (how, code, 2 * number, 2 * number + 1)
    assert len(read_sessions(tmp_path)) == 5


def timelines(folder: Path) -> Path:
    """Two processes, three steps; the second one generates slowly. Step 2 was made twice."""
    for rank, slow in ((0, 1.0), (1, 3.0)):
        rows = []
        for number, step in enumerate((1, 2, 2, 3)):
            spans = [
                ["data", 0.0, 0.1],
                ["generate", 0.1, slow],
                ["update", 3.2, 1.0],
                ["exchange", 4.2, 0.5],
            ]
            rows.append({"step": step, "at": 1000.0 + 10 * number, "spans": spans, "host": f"n{rank}"})
        rows.append({"step": 3, "at": 1035.0, "spans": [["save", 0.0, 2.0]]})
        folder.joinpath("timeline").mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / "timeline" / f"rank_{rank}.jsonl", rows)
    return folder


def test_the_slowest_rank_is_named(tmp_path: Path) -> None:
    ranks = read_timeline(timelines(tmp_path))
    found = slowest(ranks, range(3, 4))
    assert found is not None and (found.rank, found.host, found.phase) == (1, "n1", "generate")
    assert (found.seconds, found.others) == pytest.approx((4.1, 2.1))
    assert slowest(ranks[:1], range(1, 4)) is None


def test_a_trace_for_perfetto(tmp_path: Path, sip: Sip) -> None:
    run = timelines(tmp_path / "run")
    _, said, _ = sip("trace", run, "--out", tmp_path / "t.json", "--steps", "2:3")
    assert "steps 2 to 3 of 2 processes; slowest: rank 1 (n1)" in said
    trace = json.loads((tmp_path / "t.json").read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == 2 * (3 * 4 + 1)
    one = next(
        e
        for e in spans
        if e["pid"] == 1 and e["name"] == "generate" and e["args"] == {"step": 2, "making": 2}
    )
    assert (one["ts"], one["dur"]) == (1020_100_000, 3_000_000)
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert names == {"rank 0 on n0", "rank 1 on n1"}


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["runs", "nowhere"], 3, "nowhere: no such folder"),
        (["runs", "."], 3, "holds no runs"),
        (["trace", "nowhere"], 3, "nowhere: holds no timeline"),
        (["trace", "run", "--steps", "3"], 2, "--steps 3: must be FIRST:LAST"),
        (["trace", "run", "--steps", "7:9"], 3, "--steps 7:9 holds none of them"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    args: list[str], code: int, words: str, tmp_path: Path, sip: Sip
) -> None:
    if "run" in args:
        timelines(tmp_path / "run")
    fails(sip(*args), code, words)
    assert not (tmp_path / "trace.json").exists()


def test_a_run_leaves_all_of_it(
    mesh: Mesh, tmp_path: Path, capfd: pytest.CaptureFixture[str], sip: Sip
) -> None:
    cfg = run_config(tmp_path, steps=3, tracking={"use": []})
    with pytest.raises(ConfigError, match="--profile 4: this run makes steps 1 to 3"):
        train(cfg, mesh, profile=4)
    assert not cfg.out.exists()
    train(cfg, mesh, profile=2)
    assert "a trace only: without CUDA there is no memory snapshot" in capfd.readouterr().err
    with gzip.open(cfg.out / "profile" / "step_00000002" / "rank_0.trace.json.gz") as file:
        assert any(
            "addmm" in event["name"] or "mm" in event["name"] for event in json.load(file)["traceEvents"]
        )
    (rank,) = read_timeline(cfg.out)
    assert rank.host == os.uname().nodename
    steps = [made for made in rank.made if made.is_update]
    assert [made.step for made in steps] == [1, 2, 3]
    for made in steps:
        assert list(dict.fromkeys(name for name, _, _ in made.spans)) == [
            "data",
            "generate",
            "judge",
            "update",
            "exchange",
        ]
        times = [time for _, begin, end in made.spans for time in (begin, end)]
        assert all(after > before - 1e-3 for before, after in pairwise(times))  # kept to 0.1 ms
    between = [(made.step, made.spans[0][0]) for made in rank.made if not made.is_update]
    assert between == [(0, "evaluation"), (2, "evaluation"), (2, "save"), (3, "evaluation"), (3, "save")]
    (one,) = read_sessions(cfg.out)
    assert (one.how, one.from_step, one.step, one.ranks) == ("finished", 0, 3, 1)
    (listed,) = json.loads("[" + ",".join(sip("runs", tmp_path, "--json")[1].splitlines()) + "]")
    assert (listed["state"], listed["step"], listed["steps"], listed["starts"]) == ("finished", 3, 3, 1)
    assert "finished" in sip("runs", tmp_path)[1]
    train(cfg, mesh)  # found complete: no start of it is written
    assert len(read_sessions(cfg.out)) == 1
