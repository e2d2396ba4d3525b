"""The reference policy: frozen, refreshed, averaged, offloaded; whole runs with it resume as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_run
from made_choices import VOCAB, choices
from world_runs import metrics, run_config

from sip_engine.config.schema import ObjectiveConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.train import train

DPO = open_objective(ObjectiveConfig())


def three_updates(mesh: Mesh, **settings: Any) -> tuple[Reference, list[list[torch.Tensor]]]:
    """The reference after three updates, and the policy's weights before the first and after each."""
    cfg = small_run(reference=settings)
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    history = [[p.detach().clone() for p in policy.model.parameters()]]
    for step in range(1, 4):
        update(policy, reference, [DPO.row_of_choice(c) for c in choices(step, 4)], DPO)
        reference.follow(policy, step)
        history.append([p.detach().clone() for p in policy.model.parameters()])
    return reference, history


def assert_weights(reference: Reference, want: list[torch.Tensor]) -> None:
    for got, expected in zip(reference.model.parameters(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "source"), [({}, 0), ({"refresh_every": 2}, 2), ({"refresh_every": 1}, 3)]
)
def test_it_holds_the_weights_of_its_last_refresh(mesh: Mesh, settings: dict, source: int) -> None:
    reference, history = three_updates(mesh, **settings)
    assert not torch.equal(history[0][0], history[1][0])
    assert_weights(reference, history[source])


def test_a_moving_average_follows_every_update(mesh: Mesh) -> None:
    reference, history = three_updates(mesh, ema=0.75)
    want = [w.double() for w in history[0]]
    for weights in history[1:]:
        want = [0.75 * a + 0.25 * w.double() for a, w in zip(want, weights, strict=True)]
    assert_weights(reference, [w.float() for w in want])


def test_offloaded_it_scores_the_same_and_keeps_its_storage(mesh: Mesh) -> None:
    cfg = small_run(reference={"offload": True})
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    stored = [p.data_ptr() for p in reference.model.parameters()]
    batches = policy.micro_batches([DPO.row_of_choice(c) for c in choices(0, 3)])
    for got, want in zip(reference.score(batches), policy.score(batches), strict=True):
        assert torch.equal(got, want)
    assert [p.data_ptr() for p in reference.model.parameters()] == stored


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"refresh_every": 3}, {"ema": 0.5}])
def test_a_resumed_run_keeps_its_reference(mesh: Mesh, tmp_path: Path, settings: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"reference": settings, "eval": {"generate": False}}
    decay = {"optimizer": {"lr": 1e-3, "warmup_steps": 1, "eps": 1e-6, "min_lr_ratio": 1.0}}
    train(run_config(tmp_path / "straight", **changes, **decay), mesh)
    train(run_config(tmp_path / "parts", **changes, **decay, steps=2), mesh)
    train(run_config(tmp_path / "parts", **changes, **decay), mesh)
    straight = [row for row in metrics(tmp_path / "straight") if "loss" in row]
    parts = [row for row in metrics(tmp_path / "parts") if "loss" in row]
    assert parts == straight
