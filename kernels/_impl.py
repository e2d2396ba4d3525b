"""The one rule that picks an implementation of an operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from sip_engine.kernels._triton import HAS_TRITON, INTERPRETED

Impl = Literal["reference", "triton"]


def resolve_impl(impl: str | None, tensor: Tensor, allowed: Sequence[str] = ("reference", "triton")) -> str:
    """The implementation to run: `impl` if given, else "triton" for a CUDA tensor and "reference" for others.

    Raises ValueError if `impl` is not in `allowed`, or is "triton" where Triton cannot run on `tensor`.
    """
    if impl is None:
        impl = "triton" if tensor.is_cuda and "triton" in allowed else "reference"
    if impl not in allowed:
        raise ValueError(f"impl={impl!r} is unknown here: use one of {', '.join(map(repr, allowed))}")
    if impl == "triton" and not HAS_TRITON:
        raise ValueError("impl='triton' needs the triton package: install it or pass impl='reference'")
    if impl == "triton" and not (tensor.is_cuda or INTERPRETED):
        raise ValueError(
            f"impl='triton' got a tensor on {tensor.device}: move it to CUDA, set TRITON_INTERPRET=1, "
            "or pass impl='reference'"
        )
    return impl
