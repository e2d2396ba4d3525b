"""SwiGLU, the gated activation of Llama's feed-forward layer. Forward only.

N: rows (tokens), F: feed-forward size. With the halves of a row called gate and value:

    y = gate * sigmoid(gate) * value                  (in float32, rounded once)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from sip_engine.kernels._impl import Impl, resolve_impl
from sip_engine.kernels._triton import jit, tl, triton
from sip_engine.kernels.compile_report import CompileCase


def swiglu_reference(x: Tensor) -> Tensor:
    """The definition, in plain torch. See `swiglu`."""
    gate, value = x.float().chunk(2, dim=-1)
    return (silu(gate) * value).to(x.dtype)


@jit
def swiglu_kernel(x_ptr, y_ptr, x_stride, num_columns, BLOCK_F: tl.constexpr):
    """One program for BLOCK_F outputs of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = column < num_columns
    source = x_ptr + row * x_stride + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(source + num_columns, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * value
    tl.store(y_ptr + row * num_columns + column, y.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(x: Tensor) -> Tensor:
    """Run the kernel."""
    num_rows, num_columns, block = x.shape[0], x.shape[1] // 2, 1024
    y = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    swiglu_kernel[(num_rows, triton.cdiv(num_columns, block))](x, y, x.stride(0), num_columns, BLOCK_F=block)
    return y


def swiglu(x: Tensor, *, impl: Impl | None = None) -> Tensor:
    """silu(x[:, :F]) * x[:, F:] for `x` [N, 2F]; returns [N, F] of x's dtype.

    Raises ValueError on an odd width or an `impl` that does not fit.
    """
    if x.ndim != 2 or x.shape[1] % 2:
        raise ValueError(f"x {list(x.shape)} must be [N, 2F]: gate and value side by side")
    if resolve_impl(impl, x) == "reference":
        return swiglu_reference(x)
    return _launch(x if x.stride(1) == 1 else x.contiguous())


def compile_cases() -> list[CompileCase]:
    """The configurations to check for sm_90."""
    return [
        CompileCase(
            name="swiglu bf16",
            kernel=swiglu_kernel,
            signature={
                "x_ptr": "*bf16:16",
                "y_ptr": "*bf16:16",
                "x_stride": "i32:16",
                "num_columns": "i32:16",
            },
            constexprs={"BLOCK_F": 1024},
        )
    ]
