"""A run that goes on from a checkpoint is the run that was never stopped: losses, parameters, optimizer state."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_MODEL, small_run
from made_choices import VOCAB, choices
from torch import Tensor

from sip_engine.config.schema import ObjectiveConfig, RunConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.checkpoint import CheckpointState, load_checkpoint, save_checkpoint
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference

STOP, STEPS = 3, 6
TEXTS = ["the quick brown fox jumps over the lazy dog"] * 20
FORMS = list(product(["plain", "distributed"], ["fp32", "bf16"]))
"""Optimizer's form and the parameters' precision."""
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1": (1, {}),
}


def continued_config(layout: str, optimizer: str, precision: str) -> RunConfig:
    return small_run(
        steps=STEPS,
        model=SMALL_MODEL.model_dump() | {"precision": precision},
        parallel={
            "micro_batch_tokens": 60,
            "distributed_optimizer": optimizer == "distributed",
            "grad_reduce": "fp32",
            **LAYOUTS[layout][1],
        },
        eval={"generate": False},
        objective={"kind": "dpo"},
        # eps: Adam would blow the rounding of tiny gradients up to whole steps
        optimizer={"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.1, "eps": 1e-4},
    )


def steps_of(policy: Policy, reference: Reference, first: int, last: int) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of the updates first .. last - 1."""
    found = []
    for step in range(first, last):
        mine = choices(step, 4)[policy.mesh.dp.rank :: policy.mesh.dp.size]
        objective = open_objective(ObjectiveConfig(beta=0.3))
        stats = update(policy, reference, [objective.row_of_choice(c) for c in mine], objective)
        reference.follow(policy, step + 1)
        found.append((stats.loss, stats.grad_norm, stats.lr))
    return found


def optimizer_tensors(policy: Policy) -> dict[str, Tensor]:
    """This process' optimizer: master weights and state of each parameter, by number."""
    found = {}
    parts: Any = policy.optimizer
    for number, part in enumerate(parts.chained_optimizers):
        parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            found[f"{number}.{index}.param"] = parameter.detach()
            for name, value in part.optimizer.state[parameter].items():
                found[f"{number}.{index}.{name}"] = value
    return found


def assert_nothing_shared(policy: Policy) -> None:
    """No two tensors of the optimizer's state lie in one storage, nor in a parameter's."""
    places: dict[int, str] = {}
    for name, tensor in optimizer_tensors(policy).items():
        if not name.endswith(".param"):
            other = places.setdefault(tensor.untyped_storage().data_ptr(), name)
            assert other == name, f"{name} shares its storage with {other}"


def snapshot(policy: Policy, reference: Reference, curve: list) -> dict[str, Any]:
    assert_nothing_shared(policy)
    return {
        "curve": curve,
        "model": {name: p.detach().clone() for name, p in policy.model.named_parameters()},
        "reference": {name: p.detach().clone() for name, p in reference.model.named_parameters()},
        "optimizer": {name: t.clone() for name, t in optimizer_tensors(policy).items()},
        "groups": [
            {k: v for k, v in group.items() if k in ("lr", "weight_decay", "betas", "eps")}
            for group in policy.optimizer.param_groups
        ],
    }


def whole(folder: Path, layout: str, optimizer: str, precision: str, mesh: Mesh) -> None:
    """Run without a stop, writing a checkpoint in the middle; this rank's end state goes to a file."""
    cfg = continued_config(layout, optimizer, precision)
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    curve = steps_of(policy, reference, 0, STOP)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.train(TEXTS, 290, folder / f"tokenizer-{mesh.rank}.model")
    state = CheckpointState(STOP, cfg.model, VOCAB, {})
    save_checkpoint(folder / "checkpoints", policy, reference, state, tokenizer, keep=1)
    curve += steps_of(policy, reference, STOP, STEPS)
    torch.save(snapshot(policy, reference, curve), folder / f"end-{mesh.rank}.pt")


def compare(got: dict[str, Any], want: dict[str, Any], *, atol: float) -> None:
    torch.testing.assert_close(
        torch.tensor(got["curve"]), torch.tensor(want["curve"][STOP:]), atol=atol, rtol=atol
    )
    assert got["groups"] == want["groups"]
    for part in ("model", "reference", "optimizer"):
        assert got[part].keys() == want[part].keys()
        for name, tensor in got[part].items():
            expected = want[part][name]
            assert tensor.dtype == expected.dtype
            if part != "optimizer" and tensor.dtype is torch.bfloat16:  # the last bit may round the other way
                torch.testing.assert_close(tensor, expected, atol=atol, rtol=2**-7 if atol else 0)
            else:
                torch.testing.assert_close(tensor, expected, atol=atol, rtol=0, msg=f"{part} {name}")


def goes_on(written: Path, layout: str, optimizer: str, precision: str, mesh: Mesh, want: Path) -> None:
    """Load what another run wrote, make the other half of the updates and compare with the whole run's end."""
    cfg = continued_config(layout, optimizer, precision)
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    load_checkpoint(written / "checkpoints" / f"step_{STOP:08d}", policy, reference, cfg.model, VOCAB)
    assert_nothing_shared(policy)
    steps = {float(t) for name, t in optimizer_tensors(policy).items() if name.endswith(".step")}
    assert steps == {STOP}
    curve = steps_of(policy, reference, STOP, STEPS)
    expected = torch.load(want / f"end-{mesh.rank}.pt")
    compare(snapshot(policy, reference, curve), expected, atol=0.0 if written == want else 1e-4)


@pytest.mark.parametrize(("optimizer", "precision"), FORMS)
def test_one_process_goes_on_bit_for_bit(mesh: Mesh, tmp_path: Path, optimizer: str, precision: str) -> None:
    whole(tmp_path, "1", optimizer, precision, mesh)
    goes_on(tmp_path, "1", optimizer, precision, mesh, tmp_path)


@pytest.mark.parametrize(("optimizer", "precision"), FORMS)
def test_a_checkpoint_of_untrained_weights_goes_on(
    mesh: Mesh, tmp_path: Path, optimizer: str, precision: str
) -> None:
    """Adam's step count of zero, as after first updates without data, is not lost."""
    cfg = continued_config("1", optimizer, precision)
    ends = []
    for resumed in (False, True):
        policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
        reference.copy_from(policy)
        if resumed:
            tokenizer = Tokenizer.train(TEXTS, 290, tmp_path / "tokenizer.model")
            path = save_checkpoint(
                tmp_path, policy, reference, CheckpointState(0, cfg.model, VOCAB, {}), tokenizer, keep=1
            )
            load_checkpoint(path, policy, reference, cfg.model, VOCAB)
        curve = steps_of(policy, reference, 0, STOP)
        ends.append(snapshot(policy, reference, [(0.0, 0.0, 0.0)] * STOP * (not resumed) + curve))
    compare(ends[1], ends[0], atol=0.0)
