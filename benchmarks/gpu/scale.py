"""Item 13: the reference model of 1.4 B parameters: a decode step, prefill, an update, memory, launches."""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.figures import Context
from benchmarks.gpu.models import model_config, rows, run_config, sampler_of, vocab
from benchmarks.gpu.sampler_peers import SIZES
from benchmarks.record import ROOT, timed
from sip_engine.config.schema import ModelConfig, ObjectiveConfig
from sip_engine.distributed.mesh import start_mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.policy.weights import num_parameters
from sip_engine.sampler.requests import Request, SamplingParams


def reference_model(context: Context) -> None:
    """Ours, then, with the memory given back, other libraries' samplers."""
    _ours(context)
    torch.cuda.empty_cache()
    _peers(context)


def _ours(context: Context) -> None:
    """Decode 64 prefixes of 1024 tokens x 16; then a DPO update of 16,384 tokens."""
    cfg = run_config(context, model_config(context, **SIZES))
    policy = Policy(cfg, vocab(context), start_mesh())
    context.say("parameters", num_parameters(policy.model) / 1e9, "B")
    prompts, n, length, few, many = (1, 2, 9, 2, 3) if context.rehearse else (64, 16, 1024, 8, 72)
    sampler = sampler_of(context, policy.model, policy.mesh, kv_memory_mb=1 if context.rehearse else 49_152)
    rng = np.random.default_rng(0)
    asked = [
        Request(rng.integers(0, vocab(context), length).astype(np.int32), n, document=d)
        for d in range(prompts)
    ]
    for tokens in (few, many):
        sampler.generate(asked, SamplingParams(tokens))  # compiled and captured
    seconds = {
        tokens: median(timed(lambda t=tokens: sampler.generate(asked, SamplingParams(t))) for _ in range(3))
        for tokens in (few, many)
    }
    a_step = (seconds[many] - seconds[few]) / (many - few)
    floor = _floor_ms(context, cfg.model, prompts, n, length, (few + many) / 2)
    context.say(
        f"decode step, B = {prompts * n}, P = {length}", 1e3 * a_step, "ms", predicted=floor,
        note="predicted: bytes over the copy rate, a floor",
    )  # fmt: skip
    prefill = seconds[few] - few * a_step
    context.say(
        "prefill", prompts * length / max(prefill, 1e-9), "tokens/s", note="with all of a wave's set-up"
    )
    _launches(context, policy, asked[0])
    sampler.give_back()
    _update(context, cfg, policy)


def _floor_ms(
    context: Context, model: ModelConfig, prompts: int, n: int, prefix: int, seen: float
) -> float | None:
    """Weights once, each group's prefix once, each suffix once, over the measured copy rate."""
    if context.ceilings is None:
        return None
    a_token = 2 * model.num_layers * model.num_kv_heads * model.kv_channels * 2
    layer = model.hidden_size * (2 * model.num_heads * model.kv_channels + 3 * model.ffn_size)
    layer += 2 * model.hidden_size * model.num_kv_heads * model.kv_channels
    weights = 2 * (model.num_layers * layer + vocab(context) * model.hidden_size)
    return round((weights + prompts * a_token * (prefix + n * seen)) / context.ceilings.copy_bytes_s * 1e3, 2)


def _launches(context: Context, policy: Policy, request: Request) -> None:
    """Kernels of one more token without a graph, counted by torch's profiler."""
    if context.rehearse:
        context.say("launches a layer", "counted by the tests on the emulated device")
        return
    from torch.profiler import ProfilerActivity, profile

    eager = sampler_of(context, policy.model, policy.mesh, cuda_graph="off", kv_memory_mb=8192)
    counts = []
    for tokens in (2, 3):
        eager.generate([request], SamplingParams(tokens))
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            eager.generate([request], SamplingParams(tokens))
        counts.append(sum(event.count for event in seen.key_averages()))
        if context.profile:
            seen.export_chrome_trace(str(context.out / f"decode_{tokens}.json"))
    a_layer = (counts[1] - counts[0]) / SIZES["num_layers"]
    context.say(
        "launches a layer",
        a_layer,
        target="<= 11",
        ok=a_layer <= 11,
        note="those of the whole step are among them",
    )


def _peers(context: Context) -> None:
    """Other libraries' samplers, in a process of their own: they may not fit, hang or crash."""
    command = [sys.executable, "-m", "benchmarks.gpu.sampler_peers", *["--rehearse"] * context.rehearse]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("{"):
            continue
        found = json.loads(line)
        if "why" in found:
            context.say(f"beside {found['name']}", found["why"])
            continue
        ratio = found["theirs"] / found["ours"]
        context.say(
            f"times as fast as {found['name']}, {found['shape']}", ratio, "x", target=">= 4",
            ok=context.rehearse or ratio >= 4, peer=f"{found['theirs']:.3g} s, ours {found['ours']:.3g} s",
        )  # fmt: skip
    if process.wait():
        context.say("beside other samplers", f"ended with exit code {process.returncode}; see log.txt")


def _update(context: Context, cfg: Any, policy: Policy) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    reference = Reference(cfg, vocab(context), policy.mesh)
    reference.copy_from(policy)
    objective = open_objective(ObjectiveConfig(kind="dpo", beta=0.1))
    count, prefix, suffix = (2, 9, 4) if context.rehearse else (12, 1024, 128)
    batch = rows(context, count, prefix, suffix)
    tokens = sum(row.num_tokens for row in batch)
    update(policy, reference, batch, objective)
    seconds = median(
        timed(lambda: update(policy, reference, batch, objective))
        for _ in range(2 if context.rehearse else 3)
    )
    context.say(f"DPO update of {tokens} tokens", tokens / seconds, "tokens/s")
    context.say("peak memory of the update", torch.cuda.max_memory_allocated() / 2**30, "GiB", target="<= 80")
