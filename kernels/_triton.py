"""The one guarded import of Triton: without it every reference still works."""

from __future__ import annotations

import os
from typing import Any

triton: Any
tl: Any
jit: Any

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    HAS_TRITON = True
except ImportError:  # macOS, CPU-only installs
    triton = tl = None
    HAS_TRITON = False

    def jit(fn: Any) -> Any:
        """Leave the kernel a plain function, which nothing calls."""
        return fn


INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, so tensors may live on the CPU."""
