"""What a case of a kernel is, the sizes that it is run at, and how near to float64 it must come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.peers import Beside, Tensors
from sip_engine.kernels.attention_choice import Shape

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Sizes:
    """A shape to run at; `REAL` is that of the compile report's predictions."""

    sequences: int = 1024
    group: int = 16
    prefix: int = 1024
    seen: int = 64
    suffix: int = 128
    heads: int = 16
    ratio: int = 1
    """Query heads a KV head."""
    dim: int = 128
    page: int = 16
    hidden: int = 2048
    ffn: int = 5632
    vocab: int = 32_000
    tokens: int = 16_384
    rows: int = 5
    """Of the shared-prefix stream: a prefix and `group` suffixes each."""
    dtype: torch.dtype = torch.bfloat16
    pages: torch.dtype = torch.bfloat16


REAL = Sizes()
SMALL = replace(REAL, sequences=64, prefix=600, tokens=512, rows=1, vocab=4096, hidden=512, ffn=1024)
"""For float64, and for memcheck: every branch of a kernel, at a size that is quick."""
TINY = Sizes(6, 3, 21, 5, 4, 2, 1, 64, 4, 64, 48, 130, 20, 2, torch.float32, torch.float32)
ERROR = {torch.bfloat16: 2e-2, torch.float32: 2e-5}
"""Largest difference from float64 as a share of the largest value."""


@dataclass(frozen=True)
class KernelCase:
    name: str
    make: Callable[[int], Any]  # seed -> inputs on the device
    run: Callable[[Any], Tensors]
    exact: Callable[[Any], Tensors]
    error: float
    peers: dict[str, Beside] = field(default_factory=dict)
    target: float | None = None
    """Least times as fast as its first peer; negative: most times as slow."""
    predicted: dict[str, float] = field(default_factory=dict)
    """Names of the compile report that this runs at their reference shape -> how often each."""
    choice: tuple[Shape, dict[str, str]] | None = None
    """Of `attention_choice`: the shape, and peers that may be chosen at it -> their names there."""


def random(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("cuda").to(dtype)
