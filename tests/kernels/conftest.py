"""Where there is no GPU, kernels run in Triton's interpreter; both choose a device for the tests' tensors."""

from __future__ import annotations

import os
import sys

import pytest
import torch

# Triton reads the variable when it is first imported. This folder is collected before the test files beside
# it, and nothing that tests/conftest.py imports needs Triton, so one run of the whole suite has it in time.
if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "Triton was imported before tests/kernels: set TRITON_INTERPRET=1, or name tests/kernels first"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def device_and_seed():
    """New tensors are on the GPU, or on the CPU for the interpreter; every test starts from the same seed."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield
