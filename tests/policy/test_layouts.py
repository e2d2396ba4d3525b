"""The same updates at every parallel layout: losses and parameters equal those of one process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, small_run
from made_choices import VOCAB, choices
from ranks import run_ranks

from sip_engine.config.schema import ObjectiveConfig, RunConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.checkpoint import CheckpointState, load_checkpoint, save_checkpoint
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference

STEPS = 10
TEXTS = ["the quick brown fox jumps over the lazy dog"] * 20


def layout_run(layout: dict) -> RunConfig:
    return small_run(
        parallel={"micro_batch_tokens": 60, **layout},
        eval={"generate": False},
        candidates=[{"original": True, "rewrite": False, "rollouts": 0}],
        objective={"kind": "next_token"},
        # eps: Adam would blow the rounding of tiny gradients up to whole steps
        optimizer={"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.1, "eps": 1e-6},
    )


def dpo_steps(folder: Path, layout: str) -> None:
    """On every rank: ten DPO updates, each data-parallel rank on its share, then a checkpoint."""
    cfg = layout_run(json.loads(layout))
    mesh = start_mesh(cfg.parallel.tensor, cfg.parallel.pipeline)
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    losses, objective = [], open_objective(ObjectiveConfig(beta=0.3))
    for step in range(STEPS):
        mine = choices(step, 5)[mesh.dp.rank :: mesh.dp.size]
        stats = update(policy, reference, [objective.row_of_choice(c) for c in mine], objective)
        losses.append((stats.loss, stats.grad_norm))
    tokenizer = Tokenizer.train(TEXTS, 290, folder / f"tokenizer-{mesh.rank}.model")
    state = CheckpointState(STEPS, cfg.model, VOCAB, {})
    save_checkpoint(folder / "checkpoints", policy, reference, state, tokenizer, keep=1)
    (folder / f"losses-{mesh.rank}.json").write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    run_ranks("test_layouts:dpo_steps", 1, folder, "{}")
    return folder


def restored(folder: Path, mesh: Mesh, layout: dict) -> Policy:
    """A layout's checkpoint, loaded by one process."""
    cfg = layout_run({"distributed_optimizer": layout.get("distributed_optimizer", False)})
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    path = folder / "checkpoints" / f"step_{STEPS:08d}"
    load_checkpoint(path, policy, reference, SMALL_MODEL, VOCAB)
    return policy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, {"recompute": "full"}),
        (1, {"recompute": "mlp", "distributed_optimizer": True}),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence": True, "distributed_optimizer": True}),
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "distributed_optimizer": True, "recompute": "full"}),
        (2, {"overlap": True}),
        (2, {"distributed_optimizer": True, "overlap": True}),
        (2, {"distributed_optimizer": True}),
        (4, {"tensor": 2, "pipeline": 2}),
        (4, {"tensor": 2, "pipeline": 2, "sequence": True, "distributed_optimizer": True}),
        (4, {"tensor": 2, "overlap": True, "recompute": "mlp"}),
        (4, {"tensor": 2, "sequence": True, "distributed_optimizer": True}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else f"{value} ranks",
)
def test_updates_are_the_same_at_every_layout(
    mesh: Mesh, single: Path, tmp_path: Path, size: int, layout: dict
) -> None:
    run_ranks("test_layouts:dpo_steps", size, tmp_path, json.dumps(layout))
    want = np.array(json.loads((single / "losses-0.json").read_text()))
    for rank in range(size):
        got = np.array(json.loads((tmp_path / f"losses-{rank}.json").read_text()))
        np.testing.assert_allclose(got[:, 0], want[:, 0], atol=1e-4, rtol=0)
        np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-3)
    ours, theirs = restored(tmp_path, mesh, layout), restored(single, mesh, {})
    for (name, got), (_, expected) in zip(
        ours.model.named_parameters(), theirs.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0, msg=name)
    # The optimizer came along: the next update is the same as well.
    objective = open_objective(ObjectiveConfig(kind="sft_rewrite"))
    for policy in (ours, theirs):
        update(policy, None, [objective.row_of_choice(c) for c in choices(9, 5)], objective)
    for got, expected in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
