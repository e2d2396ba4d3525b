"""Counter-based random numbers: any number of any sequence, at any position, without a generator's state.

B: sequences, C: columns (token ids). Number (b, c) is one word of a Philox4x32-10 block
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):

    key     = low and high half of keys[b]
    counter = (columns[c] // 4, positions[b], 0, 0) modulo 2^32, word columns[c] % 4
    v       = min((word + 1/2) * 2^-32, 1 - 2^-24)    (float32, in the open interval (0, 1))
    gumbel  = -log(-log(1 - v))                       (largest for small v, where float32 is finest)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sip_engine.kernels._impl import Impl, resolve_impl
from sip_engine.kernels._triton import jit, tl, triton
from sip_engine.kernels.compile_report import CompileCase

LOW_WORD = 0xFFFFFFFF
"""Mask of the low 32 bits."""
CHUNK = 16384
"""Philox blocks that the reference computes at once: their temporaries stay in the cache."""


def _wrap(value: int) -> int:
    """`value` modulo 2^64, as a signed 64-bit integer."""
    return (value + 2**63) % 2**64 - 2**63


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 seen as 64 bits."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """The output of splitmix64 in state `x` (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64 bits."""
    x = x + _wrap(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _wrap(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _wrap(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def sequence_key(
    seed: int | Tensor, step: int | Tensor, document: int | Tensor, rollout: int | Tensor
) -> Tensor:
    """The 64-bit key of a rollout, int64, in the broadcast shape of the arguments.

    Arguments are int64 tensors or Python ints, which are taken modulo 2^64; arithmetic wraps around.
    key = h(h(h(h(seed) ^ step) ^ document) ^ rollout) with the bijection h = splitmix64: keys that differ in
    one argument only never collide.
    """
    key: Tensor | None = None
    for part in (seed, step, document, rollout):
        part = torch.tensor(_wrap(part)) if isinstance(part, int) else part
        key = _splitmix64(part if key is None else key ^ part)
    assert key is not None
    return key


def philox_reference(counter: tuple[Any, ...], key: tuple[Any, Any]) -> tuple[Any, ...]:
    """Philox4x32-10 of four counter words and two key words, held in int64 tensors or uint64 arrays.

    Only counter words 0 and 2 must have nothing above their low 32 bits: elsewhere, and between the rounds,
    these are cleared as late as is correct. Shapes broadcast as late as they can.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((right >> 32) ^ (c1 ^ k0)) & LOW_WORD, right
        c2, c3 = ((left >> 32) ^ (c3 ^ k1)) & LOW_WORD, left
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1 & LOW_WORD, c2, c3 & LOW_WORD


def check_counters(keys: Tensor, positions: Tensor, num_rows: int) -> None:
    """Raise ValueError unless `keys` and `positions` are int64 [num_rows]."""
    for name, tensor in (("keys", keys), ("positions", positions)):
        if tensor.shape != (num_rows,) or tensor.dtype != torch.int64:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}: must be int64 [{num_rows}], one a row"
            )


def uniform_reference(keys: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """The definition, in plain torch; on a CPU, numpy does Philox (twice as fast). See `uniform`."""
    blocks, index = torch.unique(columns // 4, return_inverse=True)
    values = torch.empty((keys.numel(), blocks.numel(), 4), dtype=torch.float32, device=keys.device)
    rows = max(1, CHUNK // max(1, blocks.numel()))
    for key, position, out in zip(keys.split(rows), positions.split(rows), values.split(rows), strict=True):
        counter: tuple[Any, ...] = (blocks[None] & LOW_WORD, position[:, None])
        halves: tuple[Any, ...] = (key[:, None], key[:, None] >> 32)
        if keys.device.type == "cpu":
            counter = tuple(word.numpy().view(np.uint64) for word in counter)
            halves = tuple(word.numpy().view(np.uint64) for word in halves)
            out = out.numpy()
        zero = counter[0][:, :1] * 0
        for lane, word in enumerate(philox_reference((*counter, zero, zero), halves)):
            out[:, :, lane] = word
    v = values.flatten(1).index_select(1, index * 4 + columns % 4)
    return v.mul_(2.0**-32).add_(2.0**-33).clamp_(max=1.0 - 2.0**-24)


def gumbel_reference(keys: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """The definition, in plain torch. See `gumbel`."""
    return uniform_reference(keys, positions, columns).neg_().log1p_().neg_().log_().neg_()


@jit
def philox_to_uniform(word):
    """v of a Philox word. The product with a power of two is exact: fused with the sum or not, bits agree."""
    return tl.minimum(word.to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)


@jit
def uniform_to_gumbel(v):
    """-log(-log(1 - v)), with a series for small v, where the hardware's logarithm loses all digits."""
    series = v * (1.0 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v * (1 / 6))))))
    return -tl.log(tl.where(v < 1 / 16, series, -tl.log(1.0 - v)))


@jit
def tile_columns(BLOCK_C: tl.constexpr):
    """The order of the columns in `gumbel_tile`: four of a Philox block lie at 2q, 2q + 1, 2q + 8, 2q + 9.

    A thread holds just these four of a wgmma accumulator, so that noise in this order never changes threads.
    """
    place = tl.arange(0, BLOCK_C)
    return place // 16 * 16 + place % 8 // 2 * 4 + place // 8 % 2 * 2 + place % 2


@jit
def gumbel_tile(keys, positions, first_column, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """Noise [BLOCK_B, BLOCK_C] of columns first_column + tile_columns(BLOCK_C), first_column a multiple of 4.

    keys, positions: int64 [BLOCK_B, 1].
    """
    blocks = (first_column // 4 + tl.arange(0, BLOCK_C // 4))[None, :]
    zero = tl.zeros([1, 1], dtype=tl.uint32)
    low, high = keys.to(tl.uint32), (keys >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(blocks.to(tl.uint32), positions.to(tl.uint32), zero, zero, low, high)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.permute(tl.reshape(words, [BLOCK_B, BLOCK_C // 16, 4, 2, 2]), [0, 1, 3, 2, 4])
    return uniform_to_gumbel(philox_to_uniform(tl.reshape(words, [BLOCK_B, BLOCK_C])))


@jit
def random_kernel(
    keys_ptr, positions_ptr, columns_ptr, out_ptr, num_columns, GUMBEL: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One program for BLOCK_C columns, in any order, of one row: a whole Philox block a column."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = index < num_columns
    column = tl.load(columns_ptr + index, mask=mask, other=0)
    key = tl.load(keys_ptr + row)
    position = tl.load(positions_ptr + row)
    zero = tl.zeros([1], dtype=tl.uint32)
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    block = (column // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(block, position.to(tl.uint32), zero, zero, low, high)
    lane = column % 4
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    value = philox_to_uniform(word)
    if GUMBEL:
        value = uniform_to_gumbel(value)
    tl.store(out_ptr + row * num_columns + index, value, mask=mask)


def _launch(keys: Tensor, positions: Tensor, columns: Tensor, is_gumbel: bool) -> Tensor:
    """Run the kernel."""
    num_rows, num_columns, block = keys.numel(), columns.numel(), 512
    out = torch.empty((num_rows, num_columns), dtype=torch.float32, device=keys.device)
    arguments = (keys.contiguous(), positions.contiguous(), columns.contiguous(), out, num_columns)
    random_kernel[(num_rows, triton.cdiv(num_columns, block))](*arguments, GUMBEL=is_gumbel, BLOCK_C=block)
    return out


def _check(keys: Tensor, positions: Tensor, columns: Tensor) -> None:
    """Raise ValueError unless the arguments are int64 [B], [B] and [C]."""
    check_counters(keys, positions, keys.numel())
    if columns.ndim != 1 or columns.dtype != torch.int64:
        raise ValueError(f"columns is {columns.dtype} {list(columns.shape)}: must be int64 [C]")


def uniform(keys: Tensor, positions: Tensor, columns: Tensor, *, impl: Impl | None = None) -> Tensor:
    """Uniform float32 [B, C] in (0, 1) for int64 `keys` [B], `positions` [B] and `columns` [C] >= 0.

    Every implementation gives the same bits. Raises ValueError on shapes, dtypes or an `impl` that do not fit.
    """
    _check(keys, positions, columns)
    if resolve_impl(impl, keys) == "reference":
        return uniform_reference(keys, positions, columns)
    return _launch(keys, positions, columns, is_gumbel=False)


def gumbel(keys: Tensor, positions: Tensor, columns: Tensor, *, impl: Impl | None = None) -> Tensor:
    """Standard Gumbel noise, float32 [B, C], between -2.9 and 22.9: -log(-log(1 - v)) of `uniform`'s v.

    Implementations agree to 1e-6 of max(1, |gumbel|). Same arguments and errors as `uniform`.
    """
    _check(keys, positions, columns)
    if resolve_impl(impl, keys) == "reference":
        return gumbel_reference(keys, positions, columns)
    return _launch(keys, positions, columns, is_gumbel=True)


def compile_cases() -> list[CompileCase]:
    """The configurations to check for sm_90."""
    signature = dict.fromkeys(("keys_ptr", "positions_ptr", "columns_ptr"), "*i64:16")
    return [
        CompileCase(
            name="gumbel",
            kernel=random_kernel,
            signature=signature | {"out_ptr": "*fp32:16", "num_columns": "i32:16"},
            constexprs={"GUMBEL": True, "BLOCK_C": 512},
        )
    ]
