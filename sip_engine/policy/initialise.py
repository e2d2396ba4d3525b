"""Initial weights: functions of the seed and a parameter's name, the same for every parallel layout.

On the CPU each whole matrix is drawn by torch's generator and cut for the shard. On CUDA, where that would take
minutes for a large model, each process draws its own part where it lies: element (row, column) of the whole matrix
comes from two counter-based uniform numbers (`kernels.random`) by Box and Muller's formula. The two kinds of device
therefore begin from different weights of the same distribution.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sip_engine.distributed.mesh import Axis
from sip_engine.kernels.random import sequence_key, uniform

CHUNK = 1 << 24
"""Elements drawn at once, which keeps what is in between small."""
_EMBEDDING = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"
_BEFORE_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialise(
    model: torch.nn.Module,
    tp: Axis,
    *,
    seed: int,
    std: float,
    num_layers: int,
    first_layer: int,
    vocab_size: int,
    tied: bool,
) -> None:
    """Draw every matrix from N(0, std²), those that write to the residual stream from N(0, std² / 2L) (GPT-2).

    `first_layer` is the number of this pipeline stage's first layer. Norms stay 1, biases 0; rows that pad the
    vocabulary are 0.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        scale = std / (2 * num_layers) ** 0.5 if name.endswith(_BEFORE_RESIDUAL) else std
        source = _EMBEDDING if tied and name == _HEAD else _global_name(name, first_layer)
        shape = list(parameter.shape)
        dim = getattr(parameter, "partition_dim", -1)
        if dim >= 0:
            shape[dim] *= tp.size
        if draws_on(parameter.device):
            rows, columns = (torch.arange(size, device=parameter.device) for size in shape)
            if dim == 0:
                rows = _shard(rows, 0, tp, halves=name.endswith("linear_fc1.weight"))
            elif dim == 1:
                columns = _shard(columns, 0, tp, halves=False)
            _draw(parameter, _seed_of(seed, source), rows, columns, scale)
            if name in (_EMBEDDING, _HEAD):
                parameter.masked_fill_((rows >= vocab_size)[:, None], 0.0)
            continue
        generator = torch.Generator().manual_seed(_seed_of(seed, source))
        if name in (_EMBEDDING, _HEAD):
            full = torch.zeros(shape)
            full[:vocab_size] = torch.empty(vocab_size, shape[1]).normal_(0, scale, generator=generator)
        else:
            full = torch.empty(shape).normal_(0, scale, generator=generator)
        parameter.copy_(_shard(full, dim, tp, halves=name.endswith("linear_fc1.weight")))


def draws_on(device: torch.device) -> bool:
    """Whether weights on this device are drawn there."""
    return device.type == "cuda"


def _draw(parameter: Tensor, seed: int, rows: Tensor, columns: Tensor, scale: float) -> None:
    """Fill `parameter` [rows, columns] with N(0, scale²); `rows` and `columns` are numbers in the whole matrix."""
    for part, numbers in zip(
        parameter.split(max(1, CHUNK // len(columns))), rows.split(max(1, CHUNK // len(columns))), strict=True
    ):
        keys = sequence_key(seed, 0, 0, numbers)
        first, second = (uniform(keys, torch.full_like(keys, place), columns) for place in (0, 1))
        radius = first.log_().mul_(-2.0).sqrt_()
        part.copy_(radius.mul_(second.mul_(2 * torch.pi).cos_()).mul_(scale))


def _shard(full: Tensor, dim: int, tp: Axis, *, halves: bool) -> Tensor:
    """This shard's part; the gate and the up half of a SwiGLU matrix are each cut."""
    if dim < 0 or tp.size == 1:
        return full
    if halves:
        return torch.cat([half.chunk(tp.size, dim)[tp.rank] for half in full.chunk(2, dim)], dim)
    return full.chunk(tp.size, dim)[tp.rank]


def _global_name(name: str, first_layer: int) -> str:
    """`decoder.layers.0.x` of a later pipeline stage is another layer of the whole model."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
