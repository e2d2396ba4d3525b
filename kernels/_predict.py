"""How long a kernel takes at a shape, from its bytes and operations and from what it compiles to.

A roofline with three ceilings (memory, tensor cores, other arithmetic), lowered by what the kernel cannot fill:

    rate of memory    = min(copy bandwidth, bytes in flight / latency)            (Little's law)
    time              = max(memory, tensor, other) where several blocks share a multiprocessor,
                        max(memory, tensor + other) where one has it alone: its softmax waits for its products
    last wave         = programs that do not fill the multiprocessors leave the rest idle

It is a prediction. Two ceilings (`gpus.toml`) were measured, by a device copy and a matrix product; the others are
data sheets'.
Nothing in it has been fitted to our kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sip_engine.kernels._gpus import GPU

LATENCY_S = 0.8e-6
"""From a load to its data in a busy memory; assumed."""
LAUNCH_S = 2e-6
"""The least a kernel takes inside a graph; assumed."""
MMA_SHARE = 0.62
"""Of wgmma's rate that mma.sync reaches on Hopper (Luo et al., arXiv 2402.13499)."""
TF32X3_SHARE = 1 / 6
"""Of the bf16 rate: three products for one, each at half of it."""


REGISTERS, SHARED_BYTES, WARPS, BLOCKS = 65_536, 233_472, 64, 32
"""Of a multiprocessor at compute capability 9.0 (CUDA C++ Programming Guide, technical specifications)."""


@dataclass(frozen=True)
class Work:
    """What a kernel does at a shape, all programs together."""

    shape: str
    programs: int
    """Those that do something."""
    num_bytes: float
    """To and from memory, once each: what several programs share, the L2 cache holds."""
    in_flight: float
    """Bytes that a program has asked for and not yet got, where it waits for memory."""
    tensor_flops: float = 0.0
    """As executed: masked and padded parts of a tile count."""
    special: float = 0.0
    """Exponentials and logarithms."""
    scalar: float = 0.0
    """Other arithmetic."""


@dataclass(frozen=True)
class Prediction:
    blocks_per_sm: int
    bound: str
    """memory, latency (too little in flight), tensor, or arithmetic."""
    seconds: float


def blocks_per_sm(num_registers: int, shared_bytes: int, num_warps: int) -> int:
    """Blocks that fit on a multiprocessor: registers go by 256 a warp, shared memory costs 1 KiB more a block."""
    a_warp = math.ceil(max(1, num_registers) * 32 / 256) * 256
    by_registers = REGISTERS // a_warp // num_warps
    by_shared = SHARED_BYTES // (shared_bytes + 1024)
    return min(by_registers, by_shared, WARPS // num_warps, BLOCKS)


def predict(
    work: Work, gpu: GPU, *, num_registers: int, shared_bytes: int, num_warps: int, tensor_share: float
) -> Prediction:
    """Time of `work`; `tensor_share` is that of the bf16 matrix rate the kernel's instructions reach."""
    blocks = max(1, blocks_per_sm(num_registers, shared_bytes, num_warps))
    slots = gpu.num_sms * blocks
    running = min(work.programs, slots)
    fed = running * work.in_flight / LATENCY_S
    memory = work.num_bytes / min(gpu.copy_bytes_s, fed)
    # Idle multiprocessors: all programs of a wave take equally long, and the last wave may be short.
    waves = work.programs / slots
    idle = math.ceil(waves) / waves if waves > 1 else max(1.0, gpu.num_sms / work.programs)
    tensor = work.tensor_flops / (gpu.bf16_flops_s * tensor_share) * idle
    other = (work.scalar / gpu.scalar_ops_s + work.special / gpu.special_ops_s) * idle
    computing = max(tensor, other) if blocks > 1 else tensor + other
    if memory >= computing:
        bound = "memory" if fed >= gpu.copy_bytes_s else "latency"
    else:
        bound = "tensor" if tensor >= other else "arithmetic"
    return Prediction(blocks, bound, max(memory, computing, LAUNCH_S))
