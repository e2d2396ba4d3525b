"""A run that goes on from a checkpoint is the run that was never stopped: losses, parameters, optimizer state."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_MODEL, small_run
from made_choices import VOCAB, choices
from megatron.core import optimizer as optimizers
from megatron.core.optimizer import distrib_optimizer
from ranks import run_ranks
from torch import Tensor

from sip_engine.config.schema import ObjectiveConfig, RunConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.checkpoint import (
    CheckpointState,
    checkpoint_tokenizer,
    load_checkpoint,
    save_checkpoint,
)
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference

STOP, STEPS = 3, 6
TEXTS = ["the quick brown fox jumps over the lazy dog"] * 20
FORMS = list(product(["plain", "distributed"], ["fp32", "bf16"]))
"""Optimizer's form and the parameters' precision."""
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1": (1, {}),
    "DP 2": (2, {}),
    "TP 2": (2, {"tensor": 2}),
    "PP 2": (2, {"pipeline": 2}),
    "TP 2 x PP 2": (4, {"tensor": 2, "pipeline": 2}),
    "DP 4": (4, {}),
}
CHANGES = [
    ("1", "DP 2"),
    ("DP 2", "1"),
    ("TP 2", "1"),
    ("PP 2", "1"),
    ("TP 2 x PP 2", "DP 4"),
    ("DP 2", "DP 2"),
]
"""Layout that wrote the checkpoint, layout that goes on."""


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
        reference={"ema": 0.5},
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
    average = reference.average
    assert average is not None
    return {
        "curve": curve,
        "average": {name: tensor.clone() for name, tensor in average.items()},
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


def bit_for_bit(first: Policy, second: Policy) -> None:
    ours, theirs = optimizer_tensors(first), optimizer_tensors(second)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []
    parameters = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in parameters)


EXACT, FP32, BF16 = (0.0, 0.0), (1e-4, 1e-4), (2e-3, 2e-2)
"""Absolute and relative tolerance. Another layout adds up in another order: in bf16, whose numbers are 2^-8 apart,
every forward pass differs by that much, in whole runs of two layouts as well. That what is loaded is what was
written is tested beside it, to the bit."""


def compare(got: dict[str, Any], want: dict[str, Any], tolerance: tuple[float, float]) -> None:
    """The second half of the curve and the end state; `want` is a whole run's."""
    atol, rtol = tolerance
    curves = [torch.tensor(curve) for curve in (got["curve"], want["curve"][STOP:])]
    torch.testing.assert_close(*curves, atol=atol, rtol=rtol, msg=lambda text: f"curve {curves}: {text}")
    assert got["groups"] == want["groups"]
    for part in ("model", "reference", "average", "optimizer"):
        assert got[part].keys() == want[part].keys()
        for name, tensor in got[part].items():
            assert tensor.dtype == want[part][name].dtype
            near = rtol if tolerance == BF16 and part != "optimizer" else 0.0
            torch.testing.assert_close(
                tensor, want[part][name], atol=atol, rtol=near, msg=lambda text, name=name: f"{name}: {text}"
            )


def goes_on(written: Path, layout: str, optimizer: str, precision: str, mesh: Mesh, want: Path) -> None:
    """Load what another run wrote, make the other half of the updates and compare with the whole run's end."""
    cfg = continued_config(layout, optimizer, precision)
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    path = written / "checkpoints" / f"step_{STOP:08d}"
    load_checkpoint(path, policy, reference, cfg.model, VOCAB)
    assert_nothing_shared(policy)
    steps = {float(t) for name, t in optimizer_tensors(policy).items() if name.endswith(".step")}
    assert steps == {STOP}
    same_layout = written == want
    if not same_layout:  # for the comparison of what was loaded with what was written
        tokenizer = checkpoint_tokenizer(path)
        state = CheckpointState(STOP, cfg.model, VOCAB, {})
        again = rewritten(written, layout)
        save_checkpoint(again.parent, policy, reference, state, tokenizer, keep=1)
    curve = steps_of(policy, reference, STOP, STEPS)
    expected = torch.load(want / f"end-{mesh.rank}.pt")
    changed = BF16 if precision == "bf16" else FP32
    compare(snapshot(policy, reference, curve), expected, EXACT if same_layout else changed)


def rewritten(written: Path, layout: str) -> Path:
    """Where `goes_on` writes what it has loaded."""
    return written / f"again {layout}" / f"step_{STOP:08d}"


@pytest.mark.parametrize(("optimizer", "precision"), FORMS)
def test_one_process_goes_on_bit_for_bit(mesh: Mesh, tmp_path: Path, optimizer: str, precision: str) -> None:
    whole(tmp_path, "1", optimizer, precision, mesh)
    goes_on(tmp_path, "1", optimizer, precision, mesh, tmp_path)


@pytest.mark.parametrize(("optimizer", "precision"), FORMS[:2])
def test_an_installed_transformer_engine_changes_no_optimizer(
    mesh: Mesh, tmp_path: Path, optimizer: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimizer would be taken by its mere presence, and keeps its step count elsewhere."""
    for module in (optimizers, distrib_optimizer):
        monkeypatch.setattr(module, "Adam", lambda *_, **__: pytest.fail("another optimizer than torch's"))
    monkeypatch.setattr(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
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
    compare(ends[1], ends[0], EXACT)


def whole_runs(folder: Path, layout: str) -> None:
    """On every rank: the run without a stop, in every form."""
    sizes = LAYOUTS[layout][1]
    mesh = start_mesh(sizes.get("tensor", 1), sizes.get("pipeline", 1))
    for optimizer, precision in FORMS:
        whole(folder / layout / f"{optimizer}-{precision}", layout, optimizer, precision, mesh)


def continuations(folder: Path, layout: str) -> None:
    """On every rank: go on from every checkpoint that this layout is to go on from; what differs, to a file."""
    sizes = LAYOUTS[layout][1]
    mesh = start_mesh(sizes.get("tensor", 1), sizes.get("pipeline", 1))
    found = {}
    for written_by in [source for source, target in CHANGES if target == layout]:
        for optimizer, precision in FORMS:
            form = f"{optimizer}-{precision}"
            written, want = folder / written_by / form, folder / layout / form
            try:
                goes_on(written, layout, optimizer, precision, mesh, want)
                differing = ""
            except AssertionError as error:
                differing = str(error)
            found[f"{written_by} -> {layout}, {form}"] = differing
    (folder / f"found {layout}-{mesh.rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Every change of layout in every form -> what differs on the first rank where something does."""
    folder = tmp_path_factory.mktemp("layouts")
    for layout, (size, _) in LAYOUTS.items():
        run_ranks("test_continuation:whole_runs", size, folder, layout)
    found: dict[str, str] = {}
    for layout in dict.fromkeys(target for _, target in CHANGES):
        size = LAYOUTS[layout][0]
        run_ranks("test_continuation:continuations", size, folder, layout)
        for rank in range(size):
            for cell, differing in json.loads((folder / f"found {layout}-{rank}.json").read_text()).items():
                found[cell] = found.get(cell) or (differing and f"rank {rank}: {differing}")
    return folder, found


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "precision"), FORMS)
@pytest.mark.parametrize(("written_by", "layout"), CHANGES)
def test_another_layout_goes_on(
    mesh: Mesh,
    table: tuple[Path, dict[str, str]],
    written_by: str,
    layout: str,
    optimizer: str,
    precision: str,
) -> None:
    """Like that layout's own whole run; and what it has loaded is what was written, bit for bit."""
    folder, found = table
    form = f"{optimizer}-{precision}"
    assert found[f"{written_by} -> {layout}, {form}"] == ""
    if written_by == layout:
        return
    cfg, policies = continued_config("1", optimizer, precision), []
    written = folder / written_by / form
    for path in (written / "checkpoints" / f"step_{STOP:08d}", rewritten(written, layout)):
        policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
        load_checkpoint(path, policy, reference, cfg.model, VOCAB)
        policies.append(policy)
    bit_for_bit(*policies)
