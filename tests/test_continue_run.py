"""Runs that are killed, whose checkpoints are damaged or parameters ruined: what goes on, and from where."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from world_runs import metrics, pools, run_config

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.train import train
from sip_engine.utils.errors import CheckpointError, NonFiniteError

STEPS, KILLED_IN = 20, 13


def twenty_steps(folder: Path) -> RunConfig:
    """All that has a state: a moving average, a distributed optimizer, monitors, evaluations; saving beside."""
    return run_config(
        folder,
        steps=STEPS,
        batch_size=2,
        checkpoint={"every": 5, "asynchronous": True, "keep": 1},
        eval={"every": 5, "num_prefixes": 2},
        monitors={"every": 5},
        reference={"ema": 0.9},
        parallel={"distributed_optimizer": True},
    )


def train_until_killed(folder: Path) -> None:
    """In a process of its own: it kills itself in the update of step KILLED_IN, when step 10 is safe."""
    module: Any = importlib.import_module("sip_engine.train")
    real, calls = module.update, iter(range(1, STEPS + 1))

    def update(*args: Any) -> Any:
        if next(calls) == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    module.update = update
    torch.manual_seed(1)  # nothing depends on the process' own random streams
    np.random.seed(1)
    train(twenty_steps(folder), start_mesh())


def test_twenty_steps_are_ten_killed_and_ten_more(mesh: Mesh, tmp_path: Path) -> None:
    train(twenty_steps(tmp_path / "whole"), mesh)
    killed = subprocess.run(
        [sys.executable, "-P", __file__, str(tmp_path / "killed")],
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    train(twenty_steps(tmp_path / "killed"), mesh)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert pools(tmp_path / "killed") == pools(tmp_path / "whole")
    runs = [tmp_path / name / "run" for name in ("killed", "whole")]
    for name in ["baseline.jsonl", *(f"eval/step_{step:08d}.jsonl" for step in range(0, STEPS + 1, 5))]:
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
    manifests = [json.loads((run / "checkpoints/step_00000020/manifest.json").read_text()) for run in runs]
    tensors = [{n: e for n, e in m.items() if n.endswith(".distcp")} for m in manifests]
    assert tensors[0] == tensors[1] and tensors[0], (
        "parameters, Adam's state, reference and average, to the bit"
    )
    assert [p.name for p in (runs[0] / "checkpoints").iterdir()] == ["step_00000020"]


def test_a_damaged_newest_checkpoint_costs_its_steps_only(
    mesh: Mesh, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """It is set aside, and said; the records go back to the one before and become the same again."""
    cfg = run_config(tmp_path, batch_size=2, eval={"generate": False, "num_prefixes": 2})
    newest = train(cfg, mesh)
    before = metrics(tmp_path), pools(tmp_path)
    file = next((newest / "sharded").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capfd.readouterr()
    train(cfg, mesh)
    said = capfd.readouterr().err
    assert f"set aside: {file}: missing or damaged" in said and "resuming at step 2 of 4" in said
    assert (metrics(tmp_path), pools(tmp_path)) == before
    assert sorted(p.name for p in newest.parent.iterdir()) == [
        "step_00000002",
        "step_00000004",
        "step_00000004.damaged",
    ]


def test_ruined_parameters_are_not_saved(mesh: Mesh, tmp_path: Path) -> None:
    """A learning rate of 1e9; with a sane one the run goes on from the last good step, under the settings of now."""
    plain: dict[str, Any] = {"batch_size": 2, "eval": {"generate": False, "num_prefixes": 2}}
    plain |= {"checkpoint": {"every": 1, "keep": 9}, "monitors": {"every": 0}, "max_drift": 1e9}
    train(run_config(tmp_path, steps=1, **plain), mesh)
    ruinous = {"lr": 1e9, "warmup_steps": 0}
    for _ in range(2):
        with pytest.raises(NonFiniteError):
            train(run_config(tmp_path, steps=4, optimizer=ruinous, **plain), mesh)
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step_00000001"]
    train(
        run_config(
            tmp_path, steps=2, optimizer={"lr": 1e-4, "warmup_steps": 0, "min_lr_ratio": 1.0}, **plain
        ),
        mesh,
    )
    assert [row["lr"] for row in metrics(tmp_path) if "lr" in row][1] == pytest.approx(1e-4)


def test_a_folder_with_brackets_in_its_name(mesh: Mesh, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """What is said of it is said as it is, and nothing takes it for markup."""
    plain: dict[str, Any] = {"batch_size": 2, "eval": {"generate": False, "num_prefixes": 2}}
    train(run_config(tmp_path / "a[" / "b]", steps=1, **plain), mesh)
    assert "/a[/b]/run: starting" in capfd.readouterr().err


@pytest.mark.parametrize("part", ["stream", "config", "elapsed"])
@pytest.mark.parametrize("value", [None, [], "x", {"position": "3"}, -1])
def test_odd_types_in_the_runs_state_are_one_line(part: str, value: Any) -> None:
    from sip_engine.config.model import ModelConfig
    from sip_engine.policy.checkpoint import CheckpointState
    from sip_engine.run import _run_state

    state = {"stream": {"position": 0}, "config": {}, "elapsed": 1.0} | {part: value}
    if isinstance(value, dict) and part != "elapsed":
        return
    with pytest.raises(CheckpointError, match=rf"no run can go on from its state\.json \(run\.{part}"):
        _run_state(Path("step_00000001"), CheckpointState(1, ModelConfig(), 9, state))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_until_killed(Path(sys.argv[1]))
