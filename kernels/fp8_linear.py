"""y = x W^T by matrices in float8 (e4m3), quantised as Transformer Engine's recipes do it. Forward only.

M: rows (tokens), N: outputs, K: inputs, a block: [a, b] neighbouring values that share one scale.

    s = 448 / max |block|      ("blockwise": rounded down to a power of two; 1 where the block is zero)
    stored = e4m3(s * value)                          value ~ stored / s
    y[m, n] = sum_k (x[m, k] ~) (w[n, k] ~) + bias[n]           (summed in float32, rounded once)

| recipe | a block of the weight | a block of x, as the trainer quantises it | here |
| --- | --- | --- | --- |
| "blockwise" | 128 x 128 | 1 x 128 | the same, so that x's values are the trainer's bit for bit |
| "current" | the whole matrix | all tokens of a micro-batch | not quantised |

A scale over all tokens would make a row depend on the rows beside it, which differ between decoding and training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sip_engine.kernels._impl import Impl, resolve_impl
from sip_engine.kernels._triton import INTERPRETED, jit, tl, triton
from sip_engine.kernels.compile_report import CompileCase
from sip_engine.kernels.kv_layout import FP8, FP8_MAX

Recipe = Literal["current", "blockwise"]
BLOCK = 128
"""Side of a block of the blockwise recipe."""
_EXPONENT_BITS = 0x7F800000


@dataclass(frozen=True)
class Fp8Weight:
    """A quantised matrix."""

    values: Tensor
    """[N, K] float8_e4m3fn"""
    scale: Tensor
    """What a stored 1.0 stands for, float32: [1, 1] ("current") or [ceil(N / 128), ceil(K / 128)]."""
    recipe: Recipe

    @classmethod
    def like(cls, weight: Tensor, recipe: Recipe) -> Fp8Weight:
        """Memory for `weight` [N, K] quantised, to be filled by `take`."""
        blocks = [1, 1] if recipe == "current" else [-(-size // BLOCK) for size in weight.shape]
        scale = torch.empty(blocks, dtype=torch.float32, device=weight.device)
        return cls(torch.empty(weight.shape, dtype=FP8, device=weight.device), scale, recipe)

    def take(self, weight: Tensor) -> None:
        """Quantise `weight` into this memory, whose addresses stay."""
        block = (BLOCK, BLOCK) if self.recipe == "blockwise" else (weight.shape[0], weight.shape[1])
        values, scale = quantise(weight, block, power_of_two=self.recipe == "blockwise")
        self.values.copy_(values)
        self.scale.copy_(scale)


def quantise(x: Tensor, block: tuple[int, int], *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """`x` [M, K] in blocks of this size, the last ones cut off: e4m3 values [M, K], and a float32 scale a block."""
    wide = x.float()
    rows, columns = (-(-size // side) for size, side in zip(x.shape, block, strict=True))
    padded = torch.nn.functional.pad(
        wide, (0, columns * block[1] - x.shape[1], 0, rows * block[0] - x.shape[0])
    )
    largest = padded.view(rows, block[0], columns, block[1]).abs().amax((1, 3))
    factor = (FP8_MAX / largest).clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        factor = (factor.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    factor = torch.where((largest == 0) | ~largest.isfinite(), 1.0, factor)
    spread = factor.repeat_interleave(block[0], 0, output_size=rows * block[0])[: x.shape[0]]
    spread = spread.repeat_interleave(block[1], 1, output_size=columns * block[1])[:, : x.shape[1]]
    return (wide * spread).to(FP8), 1.0 / factor


def dequantise(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """What quantised values [M, K] stand for, float32."""
    spread = scale.repeat_interleave(block[0], 0, output_size=scale.shape[0] * block[0])[: values.shape[0]]
    spread = spread.repeat_interleave(block[1], 1, output_size=scale.shape[1] * block[1])[
        :, : values.shape[1]
    ]
    return values.float() * spread


def fp8_linear_reference(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """The definition, in plain torch. See `fp8_linear`."""
    if weight.recipe == "current":
        matrix, rows = weight.values.float() * weight.scale, x.float()
    else:
        matrix = dequantise(weight.values, weight.scale, (BLOCK, BLOCK))
        rows = dequantise(*quantise(x, (1, BLOCK), power_of_two=True), (1, BLOCK))
    y = rows @ matrix.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@jit
def _power_of_two_scale(largest):
    """448 / largest rounded down to a power of two, from the bits of float32: 448 is 1.75 * 2^8. 1 for 0 and inf."""
    bits = largest.to(tl.int32, bitcast=True)
    exponent = bits >> 23
    found = tl.where((bits & 0x7FFFFF) <= 0x600000, 262 - exponent, 261 - exponent)
    found = tl.where((bits == 0) | (exponent == 255), 127, tl.minimum(found, 254))
    return (found << 23).to(tl.float32, bitcast=True)


@jit
def _to_fp8(x, INTERPRETED: tl.constexpr):
    """float32 within +-448 to e4m3. The interpreter's cast rounds wrongly, and gets numbers that are e4m3 already."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        # Below 2^-6 steps are 2^-9, those of float32 from 2^14 on.
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, rounded)
    return x.to(tl.float8e4nv)


@jit(do_not_specialize=["num_rows"])
def fp8_linear_kernel(
    x_ptr, values_ptr, scale_ptr, bias_ptr, out_ptr, num_rows, num_columns, x_stride, scale_row_stride,
    scale_stride, QUANTISE: tl.constexpr, INTERPRETED: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the output; a step of the loop is one block of scales, which rows of x get on the way."""
    num_column_tiles = tl.cdiv(num_columns, BLOCK_N)
    row = tl.program_id(0) // num_column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) % num_column_tiles * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_ptrs = values_ptr + column.to(tl.int64)[:, None] * K + inner[None, :]
    scale_ptr += first_column // BLOCK_K * scale_row_stride
    is_row, is_column = (row < num_rows)[:, None], (column < num_columns)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = (inner < K - start)[None, :]
        x = tl.load(x_ptrs + start, mask=is_row & inside, other=0.0)
        w = tl.load(w_ptrs + start, mask=is_column & inside, other=0.0)
        scale = tl.load(scale_ptr + start // BLOCK_K * scale_stride)
        if QUANTISE:
            wide = x.to(tl.float32)
            factor = _power_of_two_scale(tl.max(tl.abs(wide), 1))
            part = tl.dot(_to_fp8(wide * factor[:, None], INTERPRETED), w.T)
            total += part * (scale / factor)[:, None]  # powers of two: exact
        else:
            total += tl.dot(x, w.to(x.dtype).T, input_precision="tf32x3") * scale
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=is_row & (column < num_columns)[None, :])


def _tile_rows(num_rows: int) -> int:
    """Rows of a tile: few for decoding few sequences, where the time is that of reading the matrix."""
    return 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64 if num_rows <= 64 else 128


def _launch(x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    """Run the kernel."""
    (num_rows, inner), num_columns = x.shape, weight.values.shape[0]
    out = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    blockwise = weight.recipe == "blockwise"
    block_m, block_n = _tile_rows(num_rows), BLOCK
    fp8_linear_kernel[(triton.cdiv(num_rows, block_m) * triton.cdiv(num_columns, block_n),)](
        x,
        weight.values,
        weight.scale,
        bias,
        out,
        num_rows,
        num_columns,
        x.stride(0),
        weight.scale.stride(0) if blockwise else 0,
        1 if blockwise else 0,
        QUANTISE=blockwise,
        INTERPRETED=INTERPRETED,
        K=inner,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK,
        num_warps=8 if block_m == 128 else 4,
        num_stages=3,
    )
    return out


def fp8_linear(
    x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, *, impl: Impl | None = None
) -> Tensor:
    """`x` [M, K] (bfloat16, float16 or float32) times a quantised matrix [N, K]; returns [M, N] of x's dtype.

    A row's result depends on that row alone. Raises ValueError on shapes or an `impl` that do not fit.
    """
    if x.ndim != 2 or x.shape[1] != weight.values.shape[1]:
        raise ValueError(f"x {list(x.shape)} must be [M, K] for a matrix of {list(weight.values.shape)}")
    if resolve_impl(impl, x) == "reference":
        return fp8_linear_reference(x, weight, bias)
    return _launch(x if x.stride(1) == 1 else x.contiguous(), weight, bias)


def compile_cases() -> list[CompileCase]:
    """Decoding few and many rows, both recipes."""
    pointers = {
        "x_ptr": "*bf16:16", "values_ptr": "*fp8e4nv:16", "scale_ptr": "*fp32:16", "out_ptr": "*bf16:16",
    }  # fmt: skip
    integers = {"num_rows": "i32", **dict.fromkeys(("num_columns", "x_stride"), "i32:16")}
    integers |= dict.fromkeys(("scale_row_stride", "scale_stride"), "i32")
    return [
        CompileCase(
            f"fp8 linear {recipe} rows={rows}",
            fp8_linear_kernel,
            pointers | integers,
            {
                "bias_ptr": None, "QUANTISE": recipe == "blockwise", "INTERPRETED": False, "K": 2048,
                "BLOCK_M": rows, "BLOCK_N": BLOCK, "BLOCK_K": BLOCK,
            },
            num_warps=8 if rows == 128 else 4,
            num_stages=3,
            expect_wgmma=rows >= 64,
        )
        for recipe in ("current", "blockwise")
        for rows in (16, 64, 128)
    ]  # fmt: skip
