"""Rotary position embedding, rotate-half layout (Llama, Megatron's default).

N: tokens, heads: attention heads, D: head size (even), M: rows of the tables. x1, x2: the halves of a head.

    y1 = x1 * cos[p] - x2 * sin[p]
    y2 = x2 * cos[p] + x1 * sin[p]                    (in float32, or float64 for float64; rounded once)

Column i < D / 2 of the tables holds the cosine and sine of position * frequency[i], for every position. A rotation's
transpose is the rotation back: `rotate_pair`, for training, has the same kernel with -sin as its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sip_engine.kernels._impl import Impl, resolve_impl
from sip_engine.kernels._triton import jit, tl, triton
from sip_engine.kernels.compile_report import CompileCase


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """The definition, in plain torch. See `rotary`."""
    first, second = (x if x.dtype == torch.float64 else x.float()).chunk(2, dim=-1)
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


@jit
def rotate_pair_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, num_heads, num_kv_heads, half_dim,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, INVERSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program for all heads of a token, those of q and then those of k; the tables have a row a token.

    Outputs are contiguous. INVERSE turns by the negative angle, for gradients.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    is_column = column < half_dim
    cos = tl.load(cos_ptr + token * half_dim + column, mask=is_column, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * half_dim + column, mask=is_column, other=0.0)[None, :]
    if INVERSE:
        sin = -sin
    for begin in range(0, num_heads + num_kv_heads, BLOCK_HEADS):
        head = begin + tl.arange(0, BLOCK_HEADS)
        of_k = head - num_heads
        in_q = (head < num_heads)[:, None] & is_column[None, :]
        in_k = ((of_k >= 0) & (of_k < num_kv_heads))[:, None] & is_column[None, :]
        q_from = q_ptr + token * q_token_stride + head[:, None] * q_head_stride + column[None, :]
        k_from = k_ptr + token * k_token_stride + of_k[:, None] * k_head_stride + column[None, :]
        first = tl.load(q_from, mask=in_q, other=0.0) + tl.load(k_from, mask=in_k, other=0.0)
        second = tl.load(q_from + half_dim, mask=in_q, other=0.0)
        second += tl.load(k_from + half_dim, mask=in_k, other=0.0)
        first, second = first.to(tl.float32), second.to(tl.float32)
        turned = (first * cos - second * sin).to(q_out_ptr.dtype.element_ty)
        other = (second * cos + first * sin).to(q_out_ptr.dtype.element_ty)
        q_to = q_out_ptr + (token * num_heads + head[:, None]) * 2 * half_dim + column[None, :]
        k_to = k_out_ptr + (token * num_kv_heads + of_k[:, None]) * 2 * half_dim + column[None, :]
        tl.store(q_to, turned, mask=in_q)
        tl.store(q_to + half_dim, other, mask=in_q)
        tl.store(k_to, turned, mask=in_k)
        tl.store(k_to + half_dim, other, mask=in_k)


def _launch_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Run the kernel over both."""
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    (num_tokens, num_heads, dim), num_kv_heads = q.shape, k.shape[1]
    if q.numel():
        rotate_pair_kernel[(num_tokens,)](
            q, k, cos, sin, *outs, num_heads, num_kv_heads, dim // 2,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), INVERSE=inverse,
            BLOCK_HEADS=min(16, triton.next_power_of_2(num_heads + num_kv_heads)),
            BLOCK_D=triton.next_power_of_2(dim // 2),
        )  # fmt: skip
    return outs[0], outs[1]


def rotate_pair_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: `rotary_reference` of each, row i of the tables for token i."""
    tokens = torch.arange(len(q), device=q.device)
    return rotary_reference(q, cos, sin, tokens), rotary_reference(k, cos, sin, tokens)


def _rotate_pair(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, impl: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        return _launch_pair(q, k, cos, sin, inverse)
    return rotate_pair_reference(q, k, cos, -sin if inverse else sin)


class _RotatePair(torch.autograd.Function):
    """Keeps the tables alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.impl = impl
        return _rotate_pair(q, k, cos, sin, impl, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return *_rotate_pair(d_q, d_k, *ctx.saved_tensors, ctx.impl, True), None, None, None


def rotate_pair(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, impl: Impl | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate `q` [N, heads, D] and `k` [N, kv_heads, D], of one dtype, by the angle of each token; differentiable.

    cos, sin: [N, D / 2] float32 (float64 where q is, by the reference alone). The results are contiguous.
    Raises ValueError on shapes, dtypes or an `impl` that do not fit.
    """
    tokens, half = cos.shape
    shapes_fit = q.ndim == k.ndim == 3 and q.shape[::2] == k.shape[::2] == (tokens, 2 * half)
    if not shapes_fit or cos.shape != sin.shape or q.dtype != k.dtype:
        raise ValueError(
            f"q {q.dtype} {list(q.shape)}, k {k.dtype} {list(k.shape)}, cos {list(cos.shape)}, sin "
            f"{list(sin.shape)}: must be [N, heads, D] and [N, kv_heads, D] of one dtype, [N, D / 2] and [N, D / 2]"
        )
    impl = resolve_impl(impl, q)  # pyright: ignore[reportAssignmentType]
    return _RotatePair.apply(q, k, cos.contiguous(), sin.contiguous(), impl)  # type: ignore[return-value]


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
        ),
        *(
            CompileCase(
                name=f"rotate pair {name} bf16 D=128",
                kernel=rotate_pair_kernel,
                signature={
                    **dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), "*bf16:16"),
                    **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32:16"),
                    **dict.fromkeys(("num_heads", "num_kv_heads"), "i32"),
                    "half_dim": "i32:16",
                    **dict.fromkeys(("q_token_stride", "q_head_stride"), "i32:16"),
                    **dict.fromkeys(("k_token_stride", "k_head_stride"), "i32:16"),
                },
                constexprs={"INVERSE": name == "backward", "BLOCK_HEADS": 16, "BLOCK_D": 64},
            )
            for name in ("forward", "backward")
        ),
    ]
