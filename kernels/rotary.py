"""Rotary position embedding, rotate-half layout (Llama, Megatron's default). Forward only.

N: tokens, heads: attention heads, D: head size (even), M: rows of the tables. x1, x2: the halves of a head.

    y1 = x1 * cos[p] - x2 * sin[p]
    y2 = x2 * cos[p] + x1 * sin[p]                    (in float32, rounded once)

Column i < D / 2 of the tables holds the cosine and sine of position * frequency[i], for every position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sip_engine.kernels._impl import Impl, resolve_impl
from sip_engine.kernels._triton import jit, tl, triton
from sip_engine.kernels.compile_report import CompileCase


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """The definition, in plain torch. See `rotary`."""
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


@jit
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    out_ptr,
    num_heads,
    half_dim,
    x_token_stride,
    x_head_stride,
    out_token_stride,
    out_head_stride,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for BLOCK_HEADS heads of a token; both halves are read before either is written."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_D)
    is_column = column < half_dim
    mask = (head < num_heads)[:, None] & is_column[None, :]
    table = tl.load(positions_ptr + token) * half_dim + column
    cos = tl.load(cos_ptr + table, mask=is_column, other=0.0)[None, :]
    sin = tl.load(sin_ptr + table, mask=is_column, other=0.0)[None, :]
    source = x_ptr + token * x_token_stride + head[:, None] * x_head_stride + column[None, :]
    target = out_ptr + token * out_token_stride + head[:, None] * out_head_stride + column[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half_dim, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + half_dim, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, out: Tensor) -> None:
    """Run the kernel, from x to out."""
    num_tokens, num_heads, dim = x.shape
    block_heads = min(16, triton.next_power_of_2(num_heads))
    rotary_kernel[(num_tokens, triton.cdiv(num_heads, block_heads))](
        x,
        cos,
        sin,
        positions,
        out,
        num_heads,
        dim // 2,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        BLOCK_HEADS=block_heads,
        BLOCK_D=triton.next_power_of_2(dim // 2),
    )


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """Rotate the heads of `x` [N, heads, D] by the angles of `positions` (int64 [N], each in [0, M)).

    cos, sin: float32 [M, D / 2]. The result is contiguous and has x's dtype; `x` may be a view of a wider tensor,
    with a last stride of 1. On a GPU the range of positions is not looked at: that would wait for the device.
    Raises ValueError on shapes, dtypes or an `impl` that do not fit.
    """
    if x.ndim != 3 or cos.ndim != 2 or cos.shape != sin.shape or x.shape[2] != 2 * cos.shape[1]:
        raise ValueError(
            f"x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}: must be [N, heads, D], "
            "[M, D / 2] and [M, D / 2]"
        )
    if positions.shape != x.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(
            f"positions is {positions.dtype} {list(positions.shape)}: must be int64 [{x.shape[0]}], one a token"
        )
    if resolve_impl(impl, x) == "reference":
        return rotary_reference(x, cos, sin, positions)
    if x.stride(2) != 1:
        raise ValueError(f"last stride {x.stride(2)} of x must be 1")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        _launch(x, cos.contiguous(), sin.contiguous(), positions.contiguous(), out)
    return out


def compile_cases() -> list[CompileCase]:
    """The configurations to check for sm_90."""
    strides = ("half_dim", "x_token_stride", "x_head_stride", "out_token_stride", "out_head_stride")
    signature = {
        **dict.fromkeys(("x_ptr", "out_ptr"), "*bf16:16"),
        **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32:16"),
        "positions_ptr": "*i64:16",
        "num_heads": "i32",
        **dict.fromkeys(strides, "i32:16"),
    }
    return [
        CompileCase(
            name="rotary bf16 D=128",
            kernel=rotary_kernel,
            signature=signature,
            constexprs={"BLOCK_HEADS": 16, "BLOCK_D": 64},
        )
    ]
