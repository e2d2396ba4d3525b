"""Two processes on the emulated device, with its kernels: updates and tokens of the same layout on the CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_run
from emulated_cuda import emulated_cuda
from ranks import run_ranks
from test_update_on_cuda import VOCAB, training_rows

from sip_engine.accounting.memory import AUTO_SHARE
from sip_engine.config.schema import ObjectiveConfig, SamplerConfig
from sip_engine.distributed.mesh import start_mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.policy import Policy, UpdateStats
from sip_engine.policy.reference import Reference
from sip_engine.policy.rows import Row
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.requests import Completion, Request, SamplingParams
from sip_engine.sampler.sampler import Sampler

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 48,
    "max_context": 96,
    "precision": "fp32",
    "qkv_bias": True,
    "init_std": 0.1,
}
OPTIMIZER = {"lr": 1e-2, "warmup_steps": 0, "min_lr_ratio": 1.0, "eps": 1e-4}
PARAMS = SamplingParams(max_new_tokens=3, seed=3)
UPDATES = 2


@dataclass
class Done:
    stats: list[UpdateStats]
    drawn: list[Completion]
    num_pages: int
    drift: float
    """|trainer - sampler|, nats a token; 0 before the last stage."""


def updates_and_tokens(parallel: dict[str, int]) -> Done:
    """Of this process: DPO updates, and then what is drawn from FP8 copies of the weights that they left."""
    cfg = small_run(model=MODEL, optimizer=OPTIMIZER, parallel=parallel)
    mesh = start_mesh(cfg.parallel.tensor, cfg.parallel.pipeline)
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    objective = open_objective(ObjectiveConfig(kind="dpo"))
    stats = [update(policy, reference, training_rows("dpo", seed), objective) for seed in range(UPDATES)]
    views = weight_views(policy.model, VOCAB, mesh.tp.rank)
    views = replace(views, fp8=("blockwise",) * len(views.layers))
    sampler = Sampler(views, mesh, SamplerConfig(kv_memory_mb="auto", page_size=4))
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(0, VOCAB, size).astype(np.int32), 2, size) for size in (3, 9)]
    groups = sampler.generate(requests, PARAMS)
    drawn = [one for group in groups for one in group]
    rows = [Row(r.prefix_ids, tuple(c.ids for c in group)) for r, group in zip(requests, groups, strict=True)]
    scored = [part.cpu().numpy() for part in policy.score(policy.micro_batches(rows))]
    logprobs = np.concatenate([one.logprobs for one in drawn])
    drift = float(np.abs(np.concatenate(scored) - logprobs).mean()) if scored else 0.0
    return Done(stats, drawn, sampler.limits.num_pages, drift)


def on_ranks(folder: Path, parallel: str) -> None:
    layout: dict[str, int] = json.loads(parallel)
    on_cpu = updates_and_tokens(layout)
    with emulated_cuda() as cuda:
        mesh = start_mesh(layout.get("tensor", 1), layout.get("pipeline", 1))
        # Bundles must be equal on all processes: the smaller memory counts.
        cuda.free_bytes = (1 + mesh.rank) * 2**20
        found = updates_and_tokens(layout)
    for ours, theirs in zip(found.stats, on_cpu.stats, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4) and ours.grad_norm > 0.01
    assert on_cpu.drift < 0.06, "that of e4m3"
    for ours, theirs in zip(found.drawn, on_cpu.drawn, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        # Where sums differ in the last bit, a value may round to the next code.
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-3)
    kv_heads = MODEL["num_kv_heads"] // mesh.tp.size
    layers, head_dim = MODEL["num_layers"] // mesh.pp.size, MODEL["hidden_size"] // MODEL["num_heads"]
    assert found.num_pages == int(AUTO_SHARE * 2**20) // (2 * layers * 4 * kv_heads * head_dim * 4)
    launched: Any = cuda.counts.kernels
    # The policy forward and backward, and the reference forward; and the policy once more, over what was drawn.
    assert launched["rotate_pair_kernel"] == (UPDATES * 3 + 1) * layers
    # One pass for each wave's prefixes and each of their later tokens; a wave a pipeline stage.
    passes = PARAMS.max_new_tokens * mesh.pp.size
    assert launched["fp8_linear_kernel"] == passes * 4 * layers
    assert launched["swiglu_kernel"] == passes * layers
    norms = 2 * layers + (mesh.pp.is_last or mesh.pp.size == 1)
    assert launched["rms_norm_kernel"] == passes * norms


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}], ids=["tensor", "pipeline"])
def test_two_processes_with_the_devices_kernels(
    tmp_path: Path, parallel: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RoPE with its gradient in an update; matrices in FP8, SwiGLU and norms with their sums in decoding."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run_ranks("test_layouts_on_cuda:on_ranks", 2, tmp_path, json.dumps(parallel))
