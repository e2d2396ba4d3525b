"""Steps that teach nothing are said and counted, also over a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from task_runs import task_config, write_task
from test_loop import metrics, run_config

from sip_engine.distributed.mesh import Mesh
from sip_engine.train import train


def test_a_run_of_equal_candidates_says_that_it_teaches_nothing(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The likeliest token only: all rollouts are one text."""
    alike = {
        "candidates": [{"original": False, "rollouts": 3}],
        "sampler": {"top_k": 1},
        "eval": {"every": 0, "generate": False},
        "checkpoint": {"every": 1},
    }
    train(run_config(tmp_path, steps=1, **alike), mesh)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "step 1 teaches nothing" in said and "1 of 1 steps taught nothing: the policy is as it began" in said
    )
    train(run_config(tmp_path, steps=2, **alike), mesh)
    said = " ".join(capsys.readouterr().err.split())
    assert "teaches nothing" not in said and "2 of 2 steps taught nothing" in said, "it was said before"
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    assert [row["update/empty"] for row in rows] == [1.0, 1.0]
    assert all(row["pairs/dropped"] == 1.0 and row["grad_norm"] == 0.0 for row in rows)
    train(run_config(tmp_path / "other", steps=1, eval={"every": 0, "generate": False}), mesh)
    assert "nothing" not in capsys.readouterr().err
    assert all("update/empty" not in row for row in metrics(tmp_path / "other"))


def test_a_judge_whose_replies_all_earn_the_same_is_said_to_learn_nothing(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path)
    cfg = task_config(tmp_path, steps=1, sampler={"top_k": 1}, checkpoint={"every": 0})
    train(cfg, mesh)
    said = " ".join(capsys.readouterr().err.split())
    assert "step 1 teaches nothing: no prompt has two generations of different reward (groups/dropped" in said
    (row,) = [row for row in metrics(tmp_path) if "loss" in row]
    assert row["groups/dropped"] == row["update/empty"] == 1.0 and row["grad_norm"] == 0.0
