"""Peers that are gone, stopped, hang or are slow: every process ends in time, with a line that says who and where."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import saved, start, train, wait

from sip_engine.distributed.watchdog import Beat, Observer
from sip_engine.monitoring.slow import PHASES, SlowRanks

TIMEOUT = ("--faults.timeout_s", "40")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "victim", "line"),
    [
        ("at=update step=2 rank=1 do=SIGKILL", 1, "rank 1 was last heard of"),
        ("at=generate step=2 rank=1 do=SIGSTOP", 1, "rank 1 was last heard of"),
        pytest.param(
            "at=generate step=2 rank=0 do=SIGSTOP", 0, "rank 0 was last heard of", marks=pytest.mark.faults
        ),
        pytest.param("at=save rank=1 do=SIGKILL", 1, "rank 1 was last heard of", marks=pytest.mark.faults),
        pytest.param(
            "at=save rank=1 do=hang", None, "rank 1 hangs in step 2, save", marks=pytest.mark.faults
        ),
        pytest.param(
            "at=judge step=2 rank=1 do=hang", None, "rank 1 hangs in step 2, judge", marks=pytest.mark.faults
        ),
        pytest.param(
            "at=judge step=2 rank=0 do=hang", None, "rank 0 hangs in step 2, judge", marks=pytest.mark.faults
        ),
    ],
)
def test_all_end_with_a_line_when_one_is_lost(
    fault: str, victim: int | None, line: str, tmp_path: Path
) -> None:
    options = (*TIMEOUT, "--checkpoint.every", "1", "--eval.generate", "false")
    ended = train(
        tmp_path,
        *options,
        ranks=2,
        fault=fault,
        stopped=[victim] if victim is not None and "SIGSTOP" in fault else [],
    )
    for rank, one in enumerate(ended):
        if rank != victim:
            assert one.code == 8, one
            assert line in one.said and f"this is rank {rank} in step" in one.said, one.said
            assert "Traceback" not in one.said
            bundle = (tmp_path / "run" / "crash" / f"rank_{rank}.txt").read_text()
            assert line in bundle and "Thread" in bundle and "collective" not in line
    assert (tmp_path / "run" / "crash" / "config.json").is_file()
    for one in train(tmp_path, *options, ranks=2):
        assert one.code == 0, one.said


@pytest.mark.slow
@pytest.mark.faults
def test_a_pipeline_stage_that_hangs_is_named(tmp_path: Path) -> None:
    fault = "at=generate step=2 rank=1 do=hang"
    for one in train(tmp_path, *TIMEOUT, "--parallel.pipeline", 2, ranks=2, fault=fault):
        assert one.code == 8 and "rank 1 hangs in step 2, generate" in one.said, one.said


@pytest.mark.slow
@pytest.mark.faults
def test_a_rank_that_fails_is_quoted_by_the_others(tmp_path: Path) -> None:
    ended = train(tmp_path, *TIMEOUT, ranks=2, fault="at=generate step=2 rank=1 do=raise")
    assert ended[1].code == 1 and "ValueError: injected" in ended[1].said
    assert ended[0].code == 8 and "rank 1 ended in step 2, generate: injected" in ended[0].said, ended[0].said
    assert "ValueError: injected" in (tmp_path / "run" / "crash" / "rank_1.txt").read_text()


@pytest.mark.slow
@pytest.mark.faults
def test_a_slow_rank_is_named_within_three_steps(tmp_path: Path) -> None:
    fault = "at=data rank=1 do=slow=8"
    ended = train(tmp_path, "--eval.generate", "false", ranks=2, fault=fault)
    assert [one.code for one in ended] == [0, 0], ended
    assert "step 2: rank 1 is slow in data: 8." in ended[0].said, ended[0].said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "line"),
    [
        (("--optimizer.lr", "1e-2"), "optimizer.lr is 0.001 on rank 0 and 0.01 on rank 1"),
        pytest.param(
            ("--parallel.pipeline", "2"), "parallel.pipeline is 1 on rank 0 and 2", marks=pytest.mark.faults
        ),
        pytest.param(("--out", "elsewhere"), "out is ", marks=pytest.mark.faults),
    ],
)
def test_ranks_with_other_settings_are_refused(other: tuple[str, str], line: str, tmp_path: Path) -> None:
    ended = wait(start(tmp_path, ranks=2, each=[(), other]))
    assert [one.code for one in ended] == [2, 2], ended
    assert line in ended[0].said and not (tmp_path / "run").exists() and saved(tmp_path) == []


def beats(progress: int, **changes: object) -> Beat:
    values = {"count": progress, "progress": progress, "step": 3, "phase": "update", "collective": True}
    return Beat(**(values | changes))  # type: ignore[arg-type]


def test_nothing_is_concluded_while_all_get_on() -> None:
    observer = Observer(3, 20.0, 0.0)
    for second in range(1, 200):
        for rank in range(3):
            observer.hear(rank, beats(second), second)
        assert observer.conclusion(second) == ""


@given(silent=st.integers(0, 3), size=st.integers(1, 4))
def test_one_that_falls_silent_is_named_within_the_timeout(silent: int, size: int) -> None:
    silent %= size
    observer = Observer(size, 20.0, 0.0)
    found = {}
    for second in range(1, 40):
        for rank in range(size):
            observer.hear(rank, beats(min(second, 5) if rank == silent else second), second)
        if line := observer.conclusion(second):
            found.setdefault(line.split(" was")[0], second)
    assert found.keys() == {f"rank {silent}"} and 5 + 10 < found[f"rank {silent}"] <= 5 + 12


def test_of_a_run_that_stands_still_the_one_outside_the_collective_is_named() -> None:
    observer = Observer(3, 20.0, 0.0)
    for second in range(1, 30):
        for rank in range(3):
            observer.hear(rank, beats(5, count=second, collective=rank != 1, phase="save"), second)
        expected = second - 1 > 16
        assert observer.conclusion(second).startswith("rank 1 hangs in step 3, save") == expected


def test_who_waits_with_a_deadline_does_not_hang_nor_do_those_that_wait_for_it() -> None:
    observer = Observer(2, 20.0, 0.0)
    for second in range(1, 300):
        observer.hear(0, beats(1, count=second, waits=True), second)
        observer.hear(1, beats(1, count=second), second)
        assert observer.conclusion(second) == ""


def test_who_has_left_is_not_missed_and_an_error_is_quoted() -> None:
    observer = Observer(2, 20.0, 0.0)
    observer.hear(1, beats(1, left=0), 1.0)
    for second in range(1, 60):
        observer.hear(0, beats(second), second)
        assert observer.conclusion(second) == "" and observer.failed() == []
    observer.hear(1, beats(2, left=3, why="no such file"), 60.0)
    assert observer.failed() == [1]
    assert observer.say_left(1) == (3, "rank 1 ended in step 3, update: no such file")


def test_slow_is_said_in_the_second_step_running_and_once() -> None:
    slow = SlowRanks(3.0)
    usual = [0.1, 1.0, 0.5, 1.0]
    behind = [0.1, 4.0, 0.5, 1.0]
    said = [slow.see(step, [usual, behind, usual]) for step in range(1, 6)]
    assert [len(lines) for lines in said] == [0, 1, 0, 0, 0]
    assert said[1] == ["step 2: rank 1 is slow in generate: 4.00 s, 4.0 times what the others take (1.00 s)"]
    assert slow.see(6, [usual] * 3) == [] and slow.see(7, [behind, usual, usual]) == []
    assert slow.see(8, [usual, behind, usual]) == [], "not the same one twice"
    quick = [[n / 100 for n in row] for row in (usual, behind)]
    assert not any(slow.see(step, quick) for step in range(9, 20)), "hundredths of a second are noise"
    assert not any(SlowRanks(0.0).see(step, [usual, behind]) for step in range(5)) and len(PHASES) == 4
