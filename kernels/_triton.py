"""The one guarded import of Triton: without it every reference still works."""

from __future__ import annotations

import os
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and other machines that Triton has no package for
    triton = tl = None  # pyright: ignore[reportAssignmentType]

HAS_TRITON = triton is not None

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, which takes tensors on the CPU."""


def _leave(function: Any = None, **_: Any) -> Any:
    """Stand in for `triton.jit`, on kernels that cannot be called."""
    return _leave if function is None else function


jit: Any = triton.jit if triton is not None else _leave
"""With `do_not_specialize=NAMES` for counts that change from step to step: else every kernel would be compiled once
more when one of them is 1, and when it is a multiple of 16, in the middle of a run."""
