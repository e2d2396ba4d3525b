"""Signals in every phase: all ranks save the same step and leave with the same code, and the run goes on exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import INJECT, STEPS, metrics, saved, start, train, wait

from sip_engine import cli
from sip_engine.utils import heartbeat, stopping
from sip_engine.utils.errors import EXIT_CODES, SipError, Stopped

PHASES = {"data": 1, "generate": 1, "judge": 1, "update": 2, "save": STEPS, "evaluation": 2}
"""Phase of step 2 (or the first one there is) at which the signal comes, and the step that is saved then."""
SIGNALS = {"SIGTERM": 75, "SIGHUP": 75, "SIGUSR1": 75, "SIGINT": 130}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    (ended,) = train(folder)
    assert ended.code == 0, ended.said
    return folder


def goes_on(folder: Path, whole: Path, ranks: int = 1) -> None:
    """The same command again ends the run, with the records of one that was not interrupted."""
    for ended in train(folder, ranks=ranks):
        assert ended.code == 0, ended.said
    assert metrics(folder) == metrics(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "phase"),
    [
        pytest.param(name, phase, marks=() if (name, phase) in SAMPLE else pytest.mark.faults)
        for SAMPLE in [{("SIGTERM", "generate"), ("SIGINT", "evaluation")}]
        for name in SIGNALS
        for phase in PHASES
    ],
)
def test_a_signal_in_a_phase_saves_the_finished_step(
    name: str, phase: str, tmp_path: Path, whole: Path
) -> None:
    step = {"save": STEPS + 1, "evaluation": 3}.get(phase, 2)  # both come when the step is counted already
    (ended,) = train(tmp_path, fault=f"at={phase} step={step} do={name}")
    if phase == "save":  # of the last step: the run is complete by then
        assert ended.code == 0 and saved(tmp_path) == [STEPS]
        return
    assert ended.code == SIGNALS[name], ended.said
    assert saved(tmp_path) == [PHASES[phase]]
    assert f"step {PHASES[phase]} of {STEPS} is saved" in ended.said and "Traceback" not in ended.said
    goes_on(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("where", ["at=start", "at=evaluation step=1"])
def test_a_signal_before_the_first_step_leaves_nothing(where: str, tmp_path: Path) -> None:
    (ended,) = train(tmp_path, fault=f"{where} do=SIGTERM")
    assert ended.code == 75 and ended.said.splitlines()[-1].startswith("stopped by SIGTERM"), ended.said
    assert saved(tmp_path) == [] and "Traceback" not in ended.said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "phase", "rank"),
    [
        ("SIGUSR1", "update", 1),
        pytest.param("SIGTERM", "generate", 0, marks=pytest.mark.faults),
        pytest.param("SIGHUP", "data", 1, marks=pytest.mark.faults),
        pytest.param("SIGTERM", "judge", None, marks=pytest.mark.faults),
        pytest.param("SIGINT", "evaluation", 1, marks=pytest.mark.faults),
        pytest.param("SIGTERM", "evaluation", None, marks=pytest.mark.faults),
    ],
)
def test_ranks_leave_together(name: str, phase: str, rank: int | None, tmp_path: Path, whole: Path) -> None:
    step = 3 if phase == "evaluation" else 2
    fault = f"at={phase} step={step} do={name}" + (f" rank={rank}" if rank is not None else "")
    ended = train(tmp_path, ranks=2, fault=fault)
    assert [one.code for one in ended] == [SIGNALS[name]] * 2, ended
    (step,) = saved(tmp_path)  # of the same step, or the checkpoint would not be whole
    assert step in (1, 2) and f"step {step} of {STEPS} is saved" in ended[0].said
    for one in train(tmp_path, ranks=2):
        assert one.code == 0, one.said
    assert [row["step"] for row in metrics(tmp_path)] == [row["step"] for row in metrics(whole)]


@pytest.mark.slow
@pytest.mark.faults
def test_torchruns_agent_passes_a_signal_on(tmp_path: Path) -> None:
    """It sends what it gets to all ranks, and again when the first has left."""
    from small_runs import CONFIG

    (tmp_path / "run.toml").write_text(CONFIG)
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(INJECT), "train", "run.toml", "--out", "run", "--steps", "5000", "--data.cache", "cache"]
    agent = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    records = tmp_path / "run" / "metrics.jsonl"
    while agent.poll() is None and not (records.is_file() and records.read_text().count("\n") > 3):
        time.sleep(0.1)  # until it trains
    agent.send_signal(signal.SIGTERM)
    said = agent.communicate(timeout=300)[0]
    assert saved(tmp_path), said
    assert f"step {saved(tmp_path)[-1]} of 5000 is saved" in said


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_a_deadline_holds(tmp_path: Path) -> None:
    """Both while the main thread hangs, so that nothing but the listening thread can act."""
    (ended,) = train(
        tmp_path, "--faults.grace_s", "2", fault="at=update step=2 do=SIGTERM; at=update step=2 do=hang"
    )
    assert ended.code == 75 and "step 2, update did not end within faults.grace_s=2" in ended.said
    (process,) = start(tmp_path, fault="at=data step=1 do=hang")
    assert process.stdout is not None
    while "hanging" not in process.stdout.readline():
        pass
    for _ in range(600):  # a signal within two seconds of the first is the same one, passed on
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    (ended,) = wait([process])
    assert ended.code == 130 and "Ctrl-C again: ended at once" in ended.said and saved(tmp_path) == []


def test_ctrl_c_in_any_command_is_130_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_leave_process_group", lambda: None)
    monkeypatch.setattr("sip_engine.config.parse.describe_settings", interrupted)
    with pytest.raises(SystemExit) as left:
        cli.main(["settings"])
    assert left.value.code == 130
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_signals_raise_outside_a_run_and_wait_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_out_of_time", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    told = []

    class Waiting(stopping.Stoppable):
        def stop(self) -> None:
            told.append(True)

    waiting = Waiting()
    stopping.stops(waiting)
    with stopping.catch_signals(0.01), stopping.deferred():
        assert stopping.stop_requested() is None
        signal.raise_signal(signal.SIGUSR1)
        while not told:
            time.sleep(0.001)
        assert stopping.stop_requested() == signal.SIGUSR1
    with pytest.raises(Stopped) as stopped, stopping.catch_signals(60.0):
        signal.raise_signal(signal.SIGHUP)
    assert not stopping._deferred
    assert stopped.value.exit_code == 75 and signal.getsignal(signal.SIGTERM) is stopping._leave_silently
    stopping._requested = None  # for the tests after this one
    for signum in stopping.SIGNALS:
        signal.signal(signum, before if signum != signal.SIGINT else signal.default_int_handler)
    with stopping.catch_signals(60.0):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_exit_code_of_an_error_is_in_the_table(capfd: pytest.CaptureFixture[str]) -> None:
    kinds = [SipError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    codes = {Stopped(signal.SIGINT).exit_code, Stopped(signal.SIGTERM).exit_code}
    codes |= {kind.exit_code for kind in kinds if kind is not Stopped}
    assert codes < EXIT_CODES.keys()
    cli.app(["--help"], standalone_mode=False)
    said = capfd.readouterr().out
    assert all(f"{code} " in said for code in EXIT_CODES) and "requeue" not in said


def test_a_phase_that_failed_stays_where_it_failed() -> None:
    heartbeat.enter("between steps", 7)
    with pytest.raises(ValueError), heartbeat.phase("update"):
        raise ValueError
    assert str(heartbeat.position()) == "step 7, update"
    with heartbeat.phase("save"), heartbeat.waiting():
        assert heartbeat.position().waits
    assert not heartbeat.position().waits
    heartbeat.enter("start", 0)
