"""Item 1: what machine this is, and how fast it copies and multiplies."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from statistics import median

import torch

from benchmarks.gpu.figures import Context
from benchmarks.gpu.peers import LIBRARIES, why_missing
from benchmarks.record import timed


def seconds_of(calls: list[Callable[[], object]], *, rounds: int = 5, graph: bool = True) -> float:
    """Median time of one call: all of them in turn, so that no input is still in the cache; host time left out.

    With `graph` the calls are captured once and replayed.
    """
    for call in calls:
        call()
    run: Callable[[], object] = lambda: [call() for call in calls]  # noqa: E731
    if graph:
        captured = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
        run()
    return median(timed(run) for _ in range(rounds)) / len(calls)


def ceilings(context: Context) -> None:
    """Versions; Triton compiles and does not interpret; copy and GEMM."""
    from sip_engine.kernels._triton import HAS_TRITON, INTERPRETED

    for package in ("torch", "triton", "megatron-core", "numpy"):
        try:
            context.say(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            context.say(package, "not installed", ok=False)
    context.say("python", platform.python_version())
    context.say("device", torch.cuda.get_device_name())
    for library in LIBRARIES.values():
        context.say(f"peer {library.name}", why_missing(library.name) or metadata.version(library.package))
    context.check("Triton compiles", HAS_TRITON and (context.rehearse or not INTERPRETED))
    usual = context.usual
    size = 2**12 if context.rehearse else 2**30
    buffers = [torch.ones(size // 4, device="cuda") for _ in range(2)]
    targets = [torch.empty_like(buffer) for buffer in buffers]
    seconds = seconds_of([lambda a=a, b=b: b.copy_(a) for a, b in zip(buffers, targets, strict=True)])
    rate = 2 * size / seconds / 1e12
    _against_ceiling(context, "device copy", rate, "TB/s", "copy_tb_s", usual and usual.copy_tb_s)
    n = 16 if context.rehearse else 8192
    dtype = torch.float32 if context.rehearse else torch.bfloat16
    pairs = [torch.randn(2, n, n, device="cuda", dtype=dtype) for _ in range(2)]
    seconds = seconds_of([lambda x=x: torch.mm(x[0], x[1]) for x in pairs])
    rate = 2 * n**3 / seconds / 1e12
    _against_ceiling(
        context,
        "bf16 matrix product",
        rate,
        "TFLOP/s",
        "gemm_bf16_tflop_s",
        usual and usual.gemm_bf16_tflop_s,
    )


def _against_ceiling(
    context: Context, name: str, value: float, unit: str, rate: str, usual: float | None
) -> None:
    """A ceiling as measured; it becomes the one that the rest of the run is held against."""
    context.measured_rate(rate, value)
    target = "" if usual is None else f">= {0.9 * usual:.3g}"
    ok = context.rehearse or usual is None or value >= 0.9 * usual
    context.say(name, value, unit, predicted=usual, target=target, ok=ok)
