"""Items 5, 6, 7 and 10: what the sampler draws on the device, and what a wave costs beside its steps."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import numpy as np
import torch

from benchmarks.gpu.figures import Context
from benchmarks.gpu.models import (
    bits,
    build,
    model_config,
    requests,
    run_config,
    sampler_of,
    tokens,
    vocab,
)
from benchmarks.record import timed
from sip_engine.config.schema import drift_limit
from sip_engine.distributed.mesh import start_mesh
from sip_engine.policy.policy import Policy
from sip_engine.policy.rows import Row
from sip_engine.sampler.continuous import decode_continuously
from sip_engine.sampler.requests import SamplingParams

OVERHEAD_MS = 20.0
"""Most host time of a wave beside its steps, once its shape has been seen."""


def waves(context: Context) -> None:
    """Replayed graphs and eager launches give the same bits, however tokens are drawn."""
    model, mesh = build(context, model_config(context))
    new = 4 if context.rehearse else 64
    asked = (
        requests(context, 2, 2, longest=17) if context.rehearse else requests(context, 24, 8, longest=1000)
    )
    drawn = {
        "sampled": SamplingParams(new, seed=3),
        "greedy": SamplingParams(new, greedy=True),
        "top-k and top-p": SamplingParams(new, top_k=40, top_p=0.9, seed=3),
    }
    kinds = {
        **{name: ("auto", params) for name, params in drawn.items()},
        "FP8 KV": ("fp8", drawn["sampled"]),
    }
    for name, (kv_dtype, params) in kinds.items():
        if context.rehearse and name in ("greedy", "FP8 KV"):
            continue  # seconds each in the interpreter; the tests have them
        found = {
            graph: sampler_of(context, model, mesh, cuda_graph=graph, kv_dtype=kv_dtype).generate(
                asked, params
            )
            for graph in ("on", "off")
        }
        finite = all(np.isfinite(c.logprobs).all() for group in found["on"] for c in group)
        context.check(f"graph = eager, {name}", bits(found["on"]) == bits(found["off"]) and finite)


def ten_waves(context: Context) -> None:
    """Memory stays where it was after the first waves; a wave costs little beside its steps."""
    model, mesh = build(context, model_config(context))
    sampler = sampler_of(context, model, mesh)
    reserved, overhead = [], []
    for wave in range(3 if context.rehearse else 10):
        count, longest = (
            (2, 9 + 4 * (wave % 2)) if context.rehearse else (8 + 5 * (wave % 4), 300 + 90 * wave)
        )
        asked = requests(context, count, 2 if context.rehearse else 8, longest=longest, seed=wave)
        few, many = (2, 3) if context.rehearse else (8, 40)
        seconds = [
            timed(lambda n=n, asked=asked: sampler.generate(asked, SamplingParams(n))) for n in (few, many)
        ]
        a_step = (seconds[1] - seconds[0]) / (many - few)
        overhead.append(1e3 * (seconds[0] - few * a_step))
        reserved.append(torch.cuda.memory_reserved() / 2**20)
    half = len(overhead) // 2
    context.say("reserved after the first half", reserved[half], "MiB")
    grown = reserved[-1] - reserved[half]
    context.say("grown since", grown, "MiB", target="<= 64", ok=context.rehearse or grown <= 64)
    usual = median(overhead[half:])
    context.say(
        "a wave beside its steps, prefill included", usual, "ms", target=f"<= {OVERHEAD_MS:g} + prefill",
        note="wave 1: " + f"{overhead[0]:.0f} ms, with its capture",
    )  # fmt: skip


def continuous(context: Context) -> None:
    """Sequences that leave, enter and start over draw the tokens of a wave."""
    model, mesh = build(context, model_config(context))
    new = 4 if context.rehearse else 64
    asked = requests(context, 2, 2, longest=17) if context.rehearse else requests(context, 16, 8, longest=600)
    params = SamplingParams(new, seed=3)
    whole = sampler_of(context, model, mesh).generate(asked, params)
    first = [c for group in whole for c in group]
    params = replace(params, stop_ids=(int(first[0].ids[1]), int(first[-1].ids[new // 2])))
    for preempt_every in (0, 2) if context.rehearse else (0, 5):
        sampler = sampler_of(context, model, mesh)
        assert sampler.draw is not None and sampler.steps is not None
        with torch.no_grad():
            done = decode_continuously(
                sampler.decoder, sampler.draw, sampler.pages, "triton", asked, params, sampler.limits,
                steps=sampler.steps, preempt_every=preempt_every,
            )  # fmt: skip
        wanted = [_cut(c.ids.tolist(), params.stop_ids) for c in first]
        same = np.mean([a == b for a, b in zip(tokens(done), wanted, strict=True)])
        # In bf16 another batch may round otherwise, and one token then changes all that follow.
        context.say(
            f"sequences equal to the wave's{', preempted' if preempt_every else ''}", float(100 * same), "%",
            target="100 in fp32, >= 95 in bf16", ok=bool(same >= (1 if context.rehearse else 0.95)),
        )  # fmt: skip


def _cut(ids: list[int], stop: tuple[int, ...]) -> list[int]:
    ends = [place + 1 for place, token in enumerate(ids) if token in stop]
    return ids[: ends[0]] if ends else ids


def drift(context: Context) -> None:
    """|trainer - sampler| log-probs of the sampler's own tokens."""
    for name, kv_dtype in (("bf16", "auto"), ("FP8 KV", "fp8")):
        limit = drift_limit("auto", "bf16", kv_dtype)
        if context.rehearse and kv_dtype == "fp8":
            continue
        model = model_config(context, num_layers=24)
        policy = Policy(run_config(context, model), vocab(context), start_mesh())
        sampler = sampler_of(context, policy.model, policy.mesh, kv_dtype=kv_dtype)
        asked = (
            requests(context, 2, 2, longest=17) if context.rehearse else requests(context, 16, 8, longest=800)
        )
        done = sampler.generate(asked, SamplingParams(4 if context.rehearse else 128, seed=3))
        rows = [
            Row(request.prefix_ids, tuple(c.ids for c in group))
            for request, group in zip(asked, done, strict=True)
        ]
        scored = torch.cat(policy.score(policy.micro_batches(rows))).float().cpu().numpy()
        gap = np.abs(scored - np.concatenate([c.logprobs for group in done for c in group]))
        context.say(
            f"drift, {name}", float(gap.mean()), "nats a token", target=f"<= {limit:g}", ok=bool(gap.mean() <= limit),
            note=f"largest {gap.max():.3g}",
        )  # fmt: skip
        del policy, sampler
