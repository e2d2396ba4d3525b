"""Fixtures shared by the tests: one mesh for the process, small models, settings of a small run."""

from __future__ import annotations

import os

# Small tensors, several test processes: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

# Read when Triton is imported, by whichever test module comes first. The question is torch's: where it finds a GPU,
# kernels must not run in the interpreter, where they would pass unseen.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from typing import Any

import link_benchmarks  # noqa: F401  # before any test module imports them
import pytest
from command_line import no_waiting, sip  # noqa: F401  # fixtures of every test
from hypothesis import settings

from sip_engine.config.model import ModelConfig
from sip_engine.config.schema import RunConfig
from sip_engine.distributed import mesh as mesh_module
from sip_engine.distributed.mesh import Mesh, start_mesh

# Commands that run inside a test process leave the other tests' process group alone.
mesh_module.stop_mesh = lambda: None

# How long an example takes says nothing on a busy machine.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

SMALL_MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, max_context=96, init_std=0.2
)


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    return start_mesh()


def small_run(**changes: Any) -> RunConfig:
    """Settings of a small run; keyword arguments replace whole sections."""
    values: dict[str, Any] = {
        "model": SMALL_MODEL,
        "steps": 4,
        "batch_size": 4,
        "data": {"suffix_tokens": 12, "max_prefix_tokens": 24, "min_prefix_tokens": 8, "vocab_size": 400},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
    }
    return RunConfig.model_validate(values | changes)
