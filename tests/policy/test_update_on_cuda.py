"""Updates, memory and limits of the trainer's CUDA path, on the emulated device against the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import small_run
from emulated_cuda import Device, emulated_cuda
from peak_memory import PeakMemory

from sip_engine.config.schema import ObjectiveConfig, ParallelConfig, RunConfig, drift_limit
from sip_engine.distributed import mesh as mesh_module
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.model import build_model
from sip_engine.policy.policy import Policy, UpdateStats
from sip_engine.policy.reference import Reference
from sip_engine.policy.rows import Row
from sip_engine.sampler.requests import Completion
from sip_engine.types import Sample
from sip_engine.utils.errors import ConfigError

VOCAB = 101


@pytest.fixture
def cuda() -> Iterator[Device]:
    with emulated_cuda() as device:
        yield device


def settings(**changes: Any) -> RunConfig:
    model = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 48,
        "max_context": 96,
        "precision": "fp32",
    }
    optimizer = {"lr": 1e-2, "warmup_steps": 0, "min_lr_ratio": 1.0, "eps": 1e-4}
    return small_run(**{"model": model, "optimizer": optimizer} | changes)


def training_rows(kind: str, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, VOCAB, length).astype(np.int32)

    objective = open_objective(ObjectiveConfig(kind=kind))
    if kind == "grpo":
        group = [
            Completion(ids(k + 1), (-4.6 + rng.normal(size=k + 1) * 0.3).astype(np.float32)) for k in range(3)
        ]
        row = objective.row_of_group(Sample(0, 0, ids(5), ids(2), "", ""), group, [1.0, 0.0, 0.5])
        assert row is not None
        return [row]
    lengths = (4, 7) if kind == "dpo" else (6,)
    return [Row(ids(9 + n), tuple(ids(length) for length in lengths)) for n in range(2)]


def two_updates(kind: str, mesh: Mesh) -> tuple[list[UpdateStats], list[torch.Tensor]]:
    cfg = settings()
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    objective = open_objective(ObjectiveConfig(kind=kind))
    stats = [update(policy, reference, training_rows(kind, seed), objective) for seed in range(2)]
    return stats, [p.detach().cpu() for p in policy.model.parameters()]


@pytest.mark.parametrize("kind", ["dpo", "rf_nll", "grpo"])
def test_updates_equal_the_cpus(mesh: Mesh, kind: str) -> None:
    """Triton's kernels, forward and backward, and AdamW's fused form."""
    on_cpu, weights = two_updates(kind, mesh)
    with emulated_cuda() as cuda:
        on_cuda, found = two_updates(kind, start_mesh())
        assert cuda.counts["triton"] > 10
    for ours, theirs in zip(on_cuda, on_cpu, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    for ours, theirs in zip(found, weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_adamw_is_fused_on_cuda(mesh: Mesh, cuda: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step counts are on the device, too; after loading a state as well."""
    called = []
    fused = torch._fused_adamw_  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, **k: called.append(1) or fused(*a, **k))
    monkeypatch.setenv("SIP_KERNELS", "reference")
    policy = Policy(settings(), VOCAB, start_mesh())
    objective = open_objective(ObjectiveConfig(kind="rf_nll"))
    update(policy, None, training_rows("rf_nll", 0), objective)
    assert called
    (part,) = policy.optimizer.chained_optimizers  # pyright: ignore[reportAttributeAccessIssue]
    for state in part.optimizer.state.values():
        assert state["step"].is_cuda and state["step"].item() == 1.0


def test_an_update_waits_three_times_at_most(
    mesh: Mesh, cuda: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For what it logs, of all micro-batches at once; for Megatron's gradient norm, and 0.16's number of units."""
    monkeypatch.setenv("SIP_KERNELS", "reference")
    on_device, objective = start_mesh(), open_objective(ObjectiveConfig(kind="dpo"))
    for tokens, num_batches in ((4096, 1), (32, 2)):
        cfg = settings(parallel={"micro_batch_tokens": tokens})
        policy, reference = Policy(cfg, VOCAB, on_device), Reference(cfg, VOCAB, on_device)
        rows = training_rows("dpo", 0)
        assert len(policy.micro_batches(rows)) == num_batches
        update(
            policy, reference, rows, objective
        )  # Megatron-core 0.19 looks once at its groups of parameters
        with cuda.watch() as seen:
            update(policy, reference, rows, objective)
        assert seen["synchronise"] <= 3, seen.places["synchronise"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_found_without_a_copy_of_it(mesh: Mesh, bad: float) -> None:
    policy = Policy(settings(), VOCAB, mesh)
    (buffer,) = policy.ddp.buffers  # type: ignore[misc]
    with PeakMemory() as memory:
        assert policy._read([])[1]
    assert memory.largest <= 64 < buffer.grad_data.nbytes
    buffer.grad_data[7] = bad
    assert not policy._read([])[1]


def test_heads_too_wide_for_the_kernels_are_refused_before_anything_is_built(
    mesh: Mesh, cuda: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = settings().model.model_copy(update={"head_dim": 160})
    with pytest.raises(ConfigError, match=r"model.head_dim is 160: .* at most 128 on CUDA"):
        build_model(wide, ParallelConfig(), VOCAB, start_mesh(), seed=0)
    assert cuda.counts["launch"] == 0
    monkeypatch.setenv("SIP_KERNELS", "reference")
    build_model(wide, ParallelConfig(), VOCAB, start_mesh(), seed=0)


def test_the_process_group_has_a_timeout_a_device_and_gloo_for_objects(
    cuda: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **rest: asked.update(rest, backend=backend)
    )
    mesh_module._join_alone(timedelta(minutes=7))
    assert asked["backend"] == "cpu:gloo,cuda:nccl"
    assert asked["timeout"] == timedelta(minutes=7)
    assert asked["device_id"] == torch.device("cuda", 0)


def test_agreeing_and_waiting_leave_the_device_alone(mesh: Mesh, cuda: Device) -> None:
    on_device = start_mesh()
    assert on_device.device.type == "cuda"
    before = dict(cuda.counts)
    on_device.barrier()
    assert not on_device.any(False) and on_device.any(True)
    assert dict(cuda.counts) == before


def test_drift_limits_follow_the_number_formats() -> None:
    assert drift_limit("auto", "bf16", "auto") == 0.05 < drift_limit("auto", "bf16", "fp8") == 0.1
    assert drift_limit("auto", "fp8", "auto") == 0.15
    assert drift_limit(0.01, "fp8", "fp8") == 0.01
    assert settings(max_drift=0.3).drift_limit == 0.3


def test_an_offloaded_reference_keeps_no_fp8_copies(mesh: Mesh) -> None:
    cfg = settings(reference={"offload": True})
    reference = Reference(cfg, VOCAB, mesh)
    module: Any = reference.model.decoder.layers[0]
    module._fp8_workspaces = {"weight": object()}
    with reference._on_device():
        pass
    assert module._fp8_workspaces == {}


def kernels_with(argument: str) -> Iterator[tuple[str, Callable]]:
    import importlib
    import pkgutil

    import sip_engine.kernels

    for found in pkgutil.iter_modules(sip_engine.kernels.__path__):
        module = importlib.import_module(f"sip_engine.kernels.{found.name}")
        for name, value in vars(module).items():
            if hasattr(value, "arg_names") and argument in value.arg_names and "kernel" in name:
                yield name, value


@pytest.mark.parametrize("argument", ["num_rows", "num_inner", "stride_table", "num_seqs", "num_groups"])
def test_numbers_that_change_from_step_to_step_compile_nothing(argument: str) -> None:
    """Triton compiles once more where an integer is 1 or a multiple of 16, unless told not to look."""
    found = list(kernels_with(argument))
    assert found
    for name, kernel in found:
        options: Any = getattr(kernel, "kwargs", {})
        assert argument in (options.get("do_not_specialize") or ()), name
