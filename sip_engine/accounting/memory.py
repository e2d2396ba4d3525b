"""Bytes on the fullest GPU, part by part, and the largest wave of rollouts that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from sip_engine.accounting.hardware import Hardware
from sip_engine.accounting.shape import Shape
from sip_engine.accounting.workload import Workload
from sip_engine.config.schema import RunConfig

Device = Literal["cuda", "cpu"]
AUTO_SHARE = 0.8
"""kv_memory_mb="auto": the share of free memory that the sampler takes for its pages; the rest is for prefill."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. All stand at once in the update: KV pages are kept through it."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    kv: float
    activations: float
    fp8_caches: float
    judge: float
    context: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def kv_room(self, capacity: float) -> float:
        """Bytes of `capacity` that KV pages can have beside all else."""
        return max(0.0, capacity - (self.total - self.kv))


class MemoryInTurns(Memory):
    """KV pages that come and go with every step (`kv_memory_mb = "auto"`): they and the activations take turns."""

    @property
    def standing(self) -> float:
        """What stands through both."""
        return sum(vars(self).values()) - self.kv - self.activations

    @property
    def total(self) -> float:
        return self.standing + max(self.kv, self.activations)

    def kv_room(self, capacity: float) -> float:
        return max(0.0, AUTO_SHARE * (capacity - self.standing))


@dataclass(frozen=True)
class Wave:
    """Most rollouts that decode together, and how many waves a step takes."""

    groups: int
    sequences: int
    waves: int


def gradient_bytes(cfg: RunConfig, shape: Shape, parameters: int) -> int:
    """DDP's buffer, in fp32 or the parameters' type."""
    return parameters * (4 if cfg.parallel.grad_reduce == "fp32" else shape.dtype_bytes)


def optimizer_bytes(cfg: RunConfig, shape: Shape, parameters: int, replicas: int) -> float:
    """Two fp32 moments, and fp32 master weights of 16-bit parameters; sharded by the distributed optimizer."""
    per_parameter = 8 if shape.dtype_bytes == 4 else 12
    return parameters * per_parameter / (replicas if cfg.parallel.distributed_optimizer else 1)


def reference_bytes(cfg: RunConfig, shape: Shape, parameters: int) -> int:
    """The reference policy on the device while it scores; a moving average beside it is fp32."""
    if not cfg.needs_reference:
        return 0
    average = 4 * parameters if cfg.reference.ema and not cfg.reference.offload else 0
    return shape.dtype_bytes * parameters + average


def activation_bytes_per_token(cfg: RunConfig, shape: Shape, device: Device = "cuda") -> float:
    """What one layer keeps of a token for the backward pass.

    Norm inputs and outputs 4 H; q, its rotated form and the attention's output 3 A, keys and values 3 K; SwiGLU 3 F
    (gate and up, the product); log-sum-exps in fp32. With sequence parallelism the 4 H are shared out. On the CPU a
    norm works in fp32 and keeps its normalised input too, SwiGLU is not fused and keeps 5 F (silu and the shifted up
    too), and grouped keys and values are repeated for every query head.
    """
    model, parallel, size = cfg.model, cfg.parallel, shape.dtype_bytes
    hidden = model.hidden_size / (parallel.tensor if parallel.sequence else 1)
    if parallel.recompute == "full":
        return hidden * size
    a, k = shape.query_channels, shape.key_channels
    kept = 2 * hidden * norm_bytes(shape, device)
    repeated = device == "cpu" and model.num_heads != model.num_kv_heads
    kept += size * (4 * a if repeated else 3 * a + 3 * k)
    if model.qk_norm:
        kept += (a + k) * (norm_bytes(shape, device) if device == "cpu" else size)
    if parallel.recompute == "none":
        kept += size * (5 if device == "cpu" else 3) * shape.ffn_channels
    return kept + 4 * (a / model.kv_channels + 2)


def norm_bytes(shape: Shape, device: Device) -> int:
    """What a norm keeps of one channel: its output, and its input, as it is or, on the CPU, twice in fp32."""
    return shape.dtype_bytes + (8 if device == "cpu" else shape.dtype_bytes)


def activation_bytes(
    cfg: RunConfig, shape: Shape, tokens: float, targets: float, in_flight: int, device: Device = "cuda"
) -> float:
    """Kept for the backward pass by the fullest stage: `in_flight` micro-batches of `tokens` on the first one.

    Where it is also the last, the final norm's input and the hidden states of the `targets` come to it.
    """
    model, parallel = cfg.model, cfg.parallel
    kept = in_flight * tokens * shape.layers * activation_bytes_per_token(cfg, shape, device)
    kept += in_flight * tokens * model.kv_channels * 4  # cosines and sines of the rotary angles
    if parallel.pipeline == 1:
        hidden = model.hidden_size / (parallel.tensor if parallel.sequence else 1)
        kept += tokens * hidden * (norm_bytes(shape, device) - shape.dtype_bytes)
        kept += targets * model.hidden_size * shape.dtype_bytes
        if parallel.sequence:
            kept += tokens * model.hidden_size * shape.dtype_bytes  # gathered for the head
    return kept


def backward_workspace(cfg: RunConfig, shape: Shape, tokens: float) -> float:
    """Gradients of one layer under way, and with recomputation that layer's own activations (an estimate)."""
    size = shape.dtype_bytes
    under_way = tokens * (3 * shape.ffn_channels + 2 * cfg.model.hidden_size) * size
    if cfg.parallel.recompute == "none":
        return under_way
    plain = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"recompute": "none"})})
    again = activation_bytes_per_token(plain, shape) - activation_bytes_per_token(cfg, shape)
    return under_way + tokens * again


def fp8_cache_bytes(cfg: RunConfig, shape: Shape, *, samples: bool = False) -> int:
    """Transformer Engine's FP8 copies of the matrices, one in each orientation, and the one the sampler reads."""
    if cfg.model.precision != "fp8":
        return 0
    copies = 2 * shape.layers + (sampler_fp8_layers(cfg, shape) if samples else 0)
    return round(copies * shape.matrix_parameters)


def sampler_fp8_layers(cfg: RunConfig, shape: Shape) -> float:
    """Layers of a process, on average over the stages, whose matrices decoding reads at a byte a parameter."""
    model, sampler = cfg.model, cfg.sampler
    if model.precision != "fp8" or model.fp8.recipe == "delayed":
        return 0.0
    if sampler.fp8_weights == "off" or sampler.batch_invariant:
        return 0.0
    in_bf16 = min(2, model.num_layers) if model.fp8.bf16_ends else 0
    return shape.layers * (1 - in_bf16 / model.num_layers)


def num_micro_batches(cfg: RunConfig, load: Workload) -> int:
    """Of a step of one replica, rows of mean length."""
    rows = max(1, int(cfg.parallel.micro_batch_tokens // load.row))
    return -(-load.prefixes // rows)


def micro_batch_tokens(cfg: RunConfig, load: Workload) -> float:
    """Tokens of the longest micro-batch."""
    return min(load.prefixes * load.longest_row, max(cfg.parallel.micro_batch_tokens, load.longest_row))


def kv_budget(cfg: RunConfig) -> float | None:
    """Bytes of the KV pages that the settings ask for; None: as many as there is room for."""
    asked = cfg.sampler.kv_memory_mb
    return asked * 2**20 if isinstance(asked, int) else None


def memory_of(
    cfg: RunConfig, shape: Shape, load: Workload, hardware: Hardware, replicas: int, judge_bytes: float
) -> Memory:
    """All parts on the fullest process. KV pages: those asked for, or the sampler's share of what is free then."""
    parameters = shape.most_parameters
    tokens = micro_batch_tokens(cfg, load)
    targets = tokens * min(1.0, load.scored / load.row)
    in_flight = min(shape.parallel.pipeline, num_micro_batches(cfg, load))
    world = replicas * cfg.parallel.tensor * cfg.parallel.pipeline
    overheads = hardware.overheads
    context = overheads.context_gib + overheads.workspace_gib + (overheads.nccl_gib if world > 1 else 0)
    fixed = Memory(
        weights=parameters * shape.dtype_bytes,
        gradients=gradient_bytes(cfg, shape, parameters),
        optimizer=optimizer_bytes(cfg, shape, parameters, replicas),
        reference=reference_bytes(cfg, shape, parameters),
        kv=0.0,
        activations=activation_bytes(cfg, shape, tokens, targets, in_flight)
        + backward_workspace(cfg, shape, tokens),
        fp8_caches=fp8_cache_bytes(cfg, shape, samples=load.rollouts > 0),
        judge=judge_bytes,
        context=context * 2**30,
    )
    budget = kv_budget(cfg)
    if not load.rollouts:
        return fixed
    if budget is None:
        turns = MemoryInTurns(**vars(fixed))
        return replace(turns, kv=turns.kv_room(hardware.memory))
    return Memory(**{**vars(fixed), "kv": budget})


def group_bytes(cfg: RunConfig, shape: Shape, load: Workload) -> int:
    """KV bytes of the longest prefix with all its rollouts, in whole pages; the prefix's pages are shared."""
    page = cfg.sampler.page_size
    pages = -(-load.longest // page) + load.rollouts * -(-load.suffix // page)
    return pages * page * shape.kv_bytes(cfg.sampler.kv_dtype)


def wave_of(cfg: RunConfig, shape: Shape, load: Workload, kv_bytes: float, *, chunks: int = 1) -> Wave:
    """The wave that `kv_bytes` of pages and `sampler.max_sequences` allow, prefixes of greatest length.

    `chunks`: parts of the step that are generated one after the other, for the judge to work meanwhile.
    """
    if not load.rollouts:
        return Wave(0, 0, 0)
    by_pages = int(kv_bytes // group_bytes(cfg, shape, load))
    chunk = math.ceil(load.prefixes / chunks)
    groups = min(by_pages, cfg.sampler.max_sequences // load.rollouts, chunk)
    if groups == 0:
        return Wave(0, 0, 0)
    return Wave(groups, groups * load.rollouts, min(chunks, load.prefixes) * math.ceil(chunk / groups))
