"""The one rule that picks an implementation of an operation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from sip_engine.kernels._triton import HAS_TRITON, INTERPRETED

Impl = Literal["reference", "triton"]

SWITCH = "SIP_KERNELS"
SETTINGS = ("auto", "reference")
"""What the environment variable may say: Triton on CUDA, or plain torch on every device."""


def uses_triton(tensor: Tensor) -> bool:
    """Whether "triton" is the default for this tensor: on CUDA, unless SIP_KERNELS=reference switches it off."""
    return tensor.is_cuda and os.environ.get(SWITCH, "auto") != "reference"


def resolve_impl(impl: str | None, tensor: Tensor, allowed: Sequence[str] = ("reference", "triton")) -> str:
    """The implementation to run: `impl` if given, else "triton" or "reference" as `uses_triton` says.

    Raises ValueError if `impl` is not in `allowed`, or is "triton" where Triton cannot run on `tensor`.
    """
    if impl is None:
        impl = "triton" if uses_triton(tensor) and "triton" in allowed else "reference"
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
