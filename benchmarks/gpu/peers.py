"""Other libraries that the acceptance run measures beside, where they import, and what holds their calls to ours.

What has not been here to be run is checked against the library's own signatures only (tests/benchmarks).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from torch import Tensor

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Library:
    name: str
    module: str
    package: str
    """Its name in the registry."""


LIBRARIES = {
    library.name: library
    for library in (
        Library("transformers", "transformers", "transformers"),
        Library("Megatron-core", "megatron.core.inference.engines", "megatron-core"),
        Library("flash-attn", "flash_attn.flash_attn_interface", "flash-attn"),
        Library("flash-attn 4", "flash_attn.cute.interface", "flash-attn-4"),
        Library("FlashInfer", "flashinfer", "flashinfer-python"),
        Library("Liger", "liger_kernel.transformers", "liger-kernel"),
        Library("cut-cross-entropy", "cut_cross_entropy", "cut-cross-entropy"),
        Library("quack", "quack.linear_cross_entropy", "quack-kernels"),
    )
}


@cache
def why_missing(name: str) -> str:
    """Empty if the library imports, else why not."""
    library = LIBRARIES[name]
    try:
        version = metadata.version(library.package)
    except metadata.PackageNotFoundError:
        return "not installed"
    try:
        importlib.import_module(library.module)
    except Exception as error:  # a library that breaks on import is of no use, whatever it raises
        return f"{version} does not import ({first_line(error)})"
    return ""


def first_line(error: Exception) -> str:
    """An error of somebody else's on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:150]


@dataclass(frozen=True)
class Beside:
    """Another way to a case's results, or a floor under them."""

    prepare: Callable[[Any], Callable[[], Any]]
    """A case's inputs -> a call that computes from them; what it does before counts for nobody."""
    missing: Callable[[], str] = lambda: ""
    """Why it cannot be called; empty: it can."""
    of_ours: Callable[[Tensors], Tensors] | None = lambda found: found
    """Our results -> those of theirs, which must be as near to them as both are to float64. None: a floor, which does
    only part of the work, or of another size."""
    capture: bool = True
    """In a CUDA graph, as ours; otherwise with its host time, where that is longer than the kernels."""


def floor(call: Callable[[Any], Any]) -> Beside:
    """What nobody can do without."""
    return Beside(lambda inputs: lambda: call(inputs), of_ours=None)


def largest_gap(theirs: Tensors, ours: Tensors) -> float:
    """The largest difference, as a share of the largest value, over all results; infinity where shapes differ."""
    worst = 0.0
    for a, b in zip(theirs, ours, strict=True):
        if a.shape != b.shape:
            return float("inf")
        gap = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
        worst = max(worst, float("inf") if gap.isnan() else gap.item())
    return worst
