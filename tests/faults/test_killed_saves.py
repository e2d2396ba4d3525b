"""A save killed at any of its calls to the system: what is there afterwards is a whole checkpoint, and the newest is.

A process forked from the test saves step 2 beside step 1 and kills itself before or after one of the calls that
change files or their names. 50 points in `make test-faults`, every tenth of them in `make test`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_MODEL, small_run

from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.policy.checkpoint import CheckpointState, CheckpointWriter, load_checkpoint
from sip_engine.policy.checkpoint_files import complete_checkpoints, newest_intact, remove_stale
from sip_engine.policy.policy import Policy

CFG = small_run(model=SMALL_MODEL.model_dump() | {"precision": "fp32"})
VOCAB, POINTS, SAMPLE = 300, 50, 10
CALLS = {
    "open",
    "write",
    "writelines",
    "flush",
    "close",
    "fsync",
    "rename",
    "replace",
    "mkdir",
    "rmdir",
    "unlink",
}
"""Functions written in C that change files or names, whoever calls them."""


class KilledAt:
    """Counts, in all threads, what comes before and after `CALLS`; the process is killed at the `point`-th."""

    def __init__(self, point: int | None) -> None:
        self.count, self._point, self._lock = 0, point, threading.Lock()

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        del frame
        if event not in ("c_call", "c_return") or getattr(argument, "__name__", "") not in CALLS:
            return
        with self._lock:
            if self.count == self._point:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def forked(action: Callable[[], None]) -> int:
    """How a process forked from this one ends that does `action`: negative, the signal that killed it."""
    child = os.fork()
    if not child:
        code = 99
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save(folder: Path, step: int, asynchronous: bool) -> Callable[[], None]:
    """A save that is ready to begin: of a policy whose parameters are `step` more than at its start."""
    mesh = start_mesh()
    policy = Policy(CFG, VOCAB, mesh)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(float(step))
    tokenizer = Tokenizer.load(folder.parent / "tokenizer.model")
    writer = CheckpointWriter(folder, mesh, keep=1, asynchronous=asynchronous)

    def begin() -> None:
        writer.save(policy, None, CheckpointState(step, CFG.model, VOCAB, {"step": step}), tokenizer)
        writer.finish()

    return begin


def save_counted(folder: Path, asynchronous: bool, point: int | None) -> None:
    """Save step 2, to be killed at `point`; how many points there are goes to a file."""
    begin, counter = save(folder, 2, asynchronous), KilledAt(point)
    threading.setprofile(counter)
    sys.setprofile(counter)
    begin()
    sys.setprofile(None)
    (folder.parent / "count").write_text(str(counter.count))


def save_and_die(folder: Path, mode: str, *wanted: str) -> None:
    """In a process that has joined no group, which forks one for every point: 0 to POINTS - 1 of a save of step 2."""
    asynchronous = mode == "asynchronous"
    first = folder / "first"
    assert forked(lambda: save(first, 1, asynchronous)()) == 0
    shutil.copytree(first, folder / "counted")
    assert forked(lambda: save_counted(folder / "counted", asynchronous, None)) == 0
    total = int((folder / "count").read_text())
    assert total > 2 * POINTS, total
    for number in map(int, wanted):
        point = round(number * (total - 1) / (POINTS - 1))
        there = folder / f"point_{number:02d}"
        shutil.copytree(first, there)
        code = forked(lambda there=there, point=point: save_counted(there, asynchronous, point))
        assert code == -signal.SIGKILL, (number, code)


@pytest.mark.parametrize(
    "points",
    [range(9, POINTS, SAMPLE), pytest.param(range(POINTS), marks=pytest.mark.faults)],
    ids=["few", "all"],
)
@pytest.mark.parametrize("mode", ["blocking", "asynchronous"])
def test_a_save_killed_at_any_point_leaves_a_whole_checkpoint(
    mesh: Mesh, tmp_path: Path, mode: str, points: range
) -> None:
    Tokenizer.train(["a b c d e f g"] * 20, 270, tmp_path / "tokenizer.model")
    command = [sys.executable, "-P", __file__, str(tmp_path), mode, *map(str, points)]
    tests = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    policy, found = Policy(CFG, VOCAB, mesh), []
    start = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    for number in points:
        folder = tmp_path / f"point_{number:02d}"
        committed = complete_checkpoints(folder)
        newest, faults = newest_intact(folder, mesh)  # verifies it
        assert newest is not None and newest == committed[-1] and not faults, (number, faults)
        state = load_checkpoint(newest, policy, None, CFG.model, VOCAB)
        step = int(newest.name.removeprefix("step_"))
        assert state.step == state.run["step"] == step
        assert all(torch.equal(p, start[name] + step) for name, p in policy.model.named_parameters())
        remove_stale(folder)
        assert sorted(folder.iterdir()) == committed, number
        found.append(step)
    assert found == sorted(found) and set(found) == {1, 2}, found


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_and_die(Path(sys.argv[1]), *sys.argv[2:])
