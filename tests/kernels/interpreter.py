"""Import this before Triton: where there is no GPU, kernels then run in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import sys

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Triton reads the variable when it is first imported. Pytest collects this folder before the test files beside
# it, and nothing that tests/conftest.py imports needs Triton: one run of the whole suite has it in time.
if DEVICE == "cpu" and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise ImportError(
            "Triton was imported before tests/kernels: set TRITON_INTERPRET=1, or name tests/kernels first"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def rounding_error(dtype: torch.dtype, impl: str) -> float:
    """Largest relative error of rounding a result once to `dtype`, its subnormals aside."""
    if dtype == torch.bfloat16 and impl == "triton" and DEVICE == "cpu":
        return 2**-7  # the interpreter cuts off instead of rounding
    return torch.finfo(dtype).eps / 2
