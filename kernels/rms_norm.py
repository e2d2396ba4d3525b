"""RMS normalisation, alone or fused with the residual addition before it. Forward only.

N: rows (tokens), H: hidden size.

    s = x + residual                                  (rounded to x's dtype, as the residual stream is)
    y = s / sqrt(mean(s^2) + eps) * weight            (in float32, rounded once)
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from sip_engine.kernels._impl import Impl, resolve_impl
from sip_engine.kernels._triton import jit, tl, triton
from sip_engine.kernels.compile_report import CompileCase


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, in plain torch. See `rms_norm`."""
    total = x if residual is None else x + residual
    wide = total.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (wide * inverse * weight.float()).to(x.dtype)
    return y if residual is None else (y, total)


@jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    hidden_size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program a row; the row stays in registers between the sum and the scaling."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    mask = column < hidden_size
    total = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0)
        total = (total.to(tl.float32) + residual.to(tl.float32)).to(total.dtype)
        tl.store(total_ptr + row * hidden_size + column, total, mask=mask)
    wide = total.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / hidden_size + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * hidden_size + column, (wide * inverse * weight).to(total.dtype), mask=mask)


def _with_unit_stride(x: Tensor) -> Tensor:
    """`x`, copied if its rows are not contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run the kernel; returns the normalised rows and the sum (x itself without a residual)."""
    num_rows, hidden_size = x.shape
    y = torch.empty((num_rows, hidden_size), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    other = x if residual is None else _with_unit_stride(residual)
    block = triton.next_power_of_2(hidden_size)
    rms_norm_kernel[(num_rows,)](
        x,
        other,
        weight,
        y,
        total,
        x.stride(0),
        other.stride(0),
        hidden_size,
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK_H=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return y, total


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: None = None, impl: Impl | None = None
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, impl: Impl | None = None
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, impl: Impl | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise rows of `x` [N, H] by their root mean square and scale them by `weight` [H].

    With `residual` [N, H] (x's dtype) the sum s = x + residual is normalised, and (y, s) is returned.
    Outputs have x's dtype. Raises ValueError on shapes, dtypes or an `impl` that do not fit.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} must be [N, H] and [H]")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} {list(residual.shape)}, x is {x.dtype} {list(x.shape)}: "
            "give both the same dtype and shape"
        )
    if resolve_impl(impl, x) == "reference":
        return rms_norm_reference(x, weight, eps, residual=residual)
    y, total = _launch(_with_unit_stride(x), weight.contiguous(), eps, residual)
    return y if residual is None else (y, total)


def compile_cases() -> list[CompileCase]:
    """The configurations to check for sm_90."""
    pointers = ("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "total_ptr")
    sizes = ("x_stride", "residual_stride", "hidden_size")
    signature = dict.fromkeys(pointers, "*bf16:16") | dict.fromkeys(sizes, "i32:16") | {"eps": "fp32"}
    return [
        CompileCase(
            name=f"rms_norm bf16 H<={block}{' + residual' if has_residual else ''}",
            kernel=rms_norm_kernel,
            signature=signature,
            constexprs={"HAS_RESIDUAL": has_residual, "BLOCK_H": block},
            num_warps=min(16, block // 512),
        )
        for block in (2048, 8192)
        for has_residual in (False, True)
    ]
