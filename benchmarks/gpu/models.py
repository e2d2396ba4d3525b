"""Models, requests and rows that items 5 to 10 and 13 work with, small enough for a rehearsal where that is asked."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.gpu.figures import Context
from sip_engine.config.schema import ModelConfig, ParallelConfig, RunConfig, SamplerConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.rows import Row
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.requests import Completion, Request
from sip_engine.sampler.sampler import Sampler


def model_config(context: Context, **changes: Any) -> ModelConfig:
    """Eight layers of 1024, but for `changes`; in a rehearsal always one layer of 32."""
    values: dict[str, Any] = {"num_layers": 8, "hidden_size": 1024, "num_heads": 16, "num_kv_heads": 8}
    values |= {"ffn_size": 2816, "max_context": 4096, "precision": "bf16"}
    if context.rehearse:
        values |= {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48}
        values |= {"max_context": 128, "precision": "fp32", "init_std": 0.2}
    return ModelConfig(**values | ({} if context.rehearse else changes))


def vocab(context: Context) -> int:
    return 90 if context.rehearse else 32_000


def build(context: Context, model: ModelConfig) -> tuple[PolicyModel, Mesh]:
    mesh = start_mesh()
    return build_model(model, ParallelConfig(), vocab(context), mesh, seed=1), mesh


def sampler_of(context: Context, model: PolicyModel, mesh: Mesh, **settings: Any) -> Sampler:
    values: dict[str, Any] = {"kv_memory_mb": 1 if context.rehearse else 8192, "max_sequences": 1024}
    values["page_size"] = 4 if context.rehearse else 16
    return Sampler(
        weight_views(model, vocab(context), mesh.tp.rank), mesh, SamplerConfig(**values | settings)
    )


def requests(context: Context, count: int, n: int, *, longest: int, seed: int = 0) -> list[Request]:
    """Ragged prefixes, from half of `longest` up."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(longest // 2, longest, count).astype(int)
    return [
        Request(rng.integers(0, vocab(context), size).astype(np.int32), n, document=number, start=int(size))
        for number, size in enumerate(lengths)
    ]


def bits(done: list[list[Completion]]) -> list[tuple[list[int], bytes]]:
    """Tokens and the bits of their log-probs."""
    return [(c.ids.tolist(), c.logprobs.tobytes()) for group in done for c in group]


def tokens(done: list[list[Completion]]) -> list[list[int]]:
    return [c.ids.tolist() for group in done for c in group]


def run_config(context: Context, model: ModelConfig, **changes: Any) -> RunConfig:
    """A frozen learning rate without warm-up."""
    values: dict[str, Any] = {
        "model": model,
        "parallel": {"micro_batch_tokens": 16_384},
        "optimizer": {"lr": 1e-4, "warmup_steps": 0, "min_lr_ratio": 1.0},
    }
    if context.rehearse:
        values["data"] = {"max_prefix_tokens": 64, "suffix_tokens": 16}
    return RunConfig.model_validate(values | changes)


def rows(context: Context, count: int, prefix: int, suffix: int, suffixes: int = 2) -> list[Row]:
    rng = np.random.default_rng(5)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, vocab(context), length).astype(np.int32)

    return [Row(ids(prefix), tuple(ids(suffix) for _ in range(suffixes))) for _ in range(count)]
