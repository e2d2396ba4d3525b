"""How far an FP8 trainer's log-probs lie from the sampler's, with 16-bit and with FP8 weights: fake quantisation.

The trainer is Megatron's model in bf16 (or fp32) whose four matrices a layer are replaced by what Transformer Engine
computes in its forward pass: both operands rounded to e4m3 by the recipe's scales, multiplied exactly, summed in
float32. Not imitated: the order of sums and the narrower accumulator of Hopper's tensor cores, gradients (they leave
the forward pass alone), delayed scaling. Rollouts are drawn by the sampler under test and scored by the trainer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import RESULTS, header, write_csv
from sip_engine.config.model import ModelConfig
from sip_engine.config.schema import ParallelConfig, SamplerConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.kernels.fp8_linear import BLOCK, Recipe, dequantise, quantise
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.packing import pack_rows
from sip_engine.policy.policy import score
from sip_engine.policy.rows import Row
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler

_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def as_quantised(x: Tensor, block: Sequence[int], recipe: Recipe) -> Tensor:
    """`x` [M, K] as its e4m3 values stand for it, float32."""
    size = (block[0], block[1])
    return dequantise(*quantise(x, size, power_of_two=recipe == "blockwise"), size)


@contextmanager
def fake_fp8(model: PolicyModel, recipe: Recipe | None) -> Iterator[None]:
    """Inside, `model` computes its layers' matrices as Transformer Engine does. One process; no gradients."""
    replaced: list[Any] = []
    for layer in model.decoder.layers if recipe else ():
        for name in _LINEARS:
            linear: Any = layer.get_submodule(name)
            linear.forward = _forward_of(linear, recipe)
            replaced.append(linear)
    try:
        yield
    finally:
        for linear in replaced:
            del linear.forward


def _forward_of(linear: Any, recipe: Recipe | None) -> Any:
    assert recipe is not None

    def forward(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        rows = x.flatten(0, -2)
        whole = recipe == "current"
        inputs = as_quantised(rows, rows.shape[:2] if whole else (1, BLOCK), recipe)
        matrix = as_quantised(linear.weight, linear.weight.shape if whole else (BLOCK, BLOCK), recipe)
        y = F.linear(inputs, matrix, None if linear.bias is None else linear.bias.float())
        return y.to(x.dtype).view(*x.shape[:-1], -1), None

    return forward


def drift(
    model: PolicyModel,
    mesh: Mesh,
    trained: Recipe | None,
    sampled: Recipe | None,
    requests: Sequence[Request],
) -> np.ndarray:
    """|trainer - sampler| in nats, of each sampled token: matrices in FP8 by these recipes, None in 16 bits."""
    views = weight_views(model, model.true_vocab_size, mesh.tp.rank)
    views = replace(views, fp8=(sampled,) * len(views.layers))
    sampler = Sampler(views, mesh, SamplerConfig(kv_memory_mb=64, max_sequences=1024))
    done = sampler.generate(requests, SamplingParams(24, seed=1))
    rows = [
        Row(request.prefix_ids, tuple(c.ids for c in group))
        for request, group in zip(requests, done, strict=True)
    ]
    with fake_fp8(model, trained):
        (found,) = score(model, [pack_rows(rows, mesh.device)])
    drawn = np.concatenate([c.logprobs for group in done for c in group])
    return np.abs(found.numpy() - drawn)


def measure(mesh: Mesh, layers: int, hidden: int, precision: str) -> Iterator[dict[str, object]]:
    """A row for each trainer and sampler."""
    shape = ModelConfig(
        num_layers=layers, hidden_size=hidden, num_heads=hidden // 64, num_kv_heads=hidden // 128,
        ffn_size=hidden * 11 // 4 // 128 * 128, max_context=512, init_std=hidden**-0.5,
        precision=precision,  # type: ignore[arg-type]
    )  # fmt: skip
    vocabulary = 1000
    model = build_model(shape, ParallelConfig(), vocabulary, mesh, seed=1).requires_grad_(False)
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(0, vocabulary, 128).astype(np.int32), 8, number) for number in range(4)]
    recipes: tuple[Recipe, ...] = ("current", "blockwise")
    cases: list[tuple[Recipe | None, Recipe | None]] = [(None, None)]
    for recipe in recipes:
        cases += [(recipe, None), (recipe, recipe)]
    for trained, sampled in cases:
        gap = drift(model, mesh, trained, sampled, requests)
        yield {
            "trainer": trained or precision,
            "sampler": f"FP8, {sampled}" if sampled else precision,
            "mean_nats": round(float(gap.mean()), 5),
            "p99_nats": round(float(np.quantile(gap, 0.99)), 5),
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write the CSV file."""
    parser = argparse.ArgumentParser(
        description="Drift between an FP8 trainer and the sampler, fake-quantised."
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS / "fp8_drift.csv")
    args = parser.parse_args(argv)
    if args.hidden % 128 or args.hidden < 128 or args.layers < 1:
        parser.error("--hidden must be a positive multiple of 128, and --layers 1 or more")
    run = {**header("fp8_drift"), "layers": args.layers, "hidden": args.hidden}
    rows = []
    for row in measure(start_mesh(), args.layers, args.hidden, args.precision):
        print(
            f"trainer {row['trainer']:10} sampler {row['sampler']:15} {row['mean_nats']:8} nats a token",
            flush=True,
        )
        rows.append({**run, **row})
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
