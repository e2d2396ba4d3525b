"""`sip train --profile STEP`: one step under torch's profiler, and on CUDA a snapshot of its memory.

profile/step_00000012/
    rank_0.trace.json.gz     for Perfetto or chrome://tracing
    rank_0.memory.pickle     for https://docs.pytorch.org/memory_viz; CUDA only
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from sip_engine.distributed.mesh import Mesh
from sip_engine.utils.progress import console

FOLDER = "profile"
_EVENTS = 200_000
"""Allocations and frees that a snapshot tells of."""


class Profiler:
    """Profiles the one step that was asked for, if any."""

    def __init__(self, out: Path, step: int | None, mesh: Mesh, done: int) -> None:
        """done: steps that the run has made before, of which none can be profiled any more; that is said."""
        self._out, self._step, self._mesh = out, step, mesh
        if step is not None and step <= done and mesh.is_main:
            console.print(f"--profile {step}: that step was made before; nothing is profiled", soft_wrap=True)

    def around(self, step: int) -> AbstractContextManager[None]:
        """The context in which to make a step."""
        return _profiled(self._out, step, self._mesh) if step == self._step else nullcontext()


@contextmanager
def _profiled(out: Path, step: int, mesh: Mesh) -> Iterator[None]:
    """Profile what is done within as step number `step`, on every process; what cannot be written is said."""
    folder, on_cuda = out / FOLDER / f"step_{step:08d}", mesh.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_cuda else []
    if on_cuda:
        torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
    try:
        with torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True) as profile:
            yield
        written = _write(folder, mesh.rank, profile, on_cuda)
    finally:
        if on_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
    if mesh.is_main:
        console.print(f"profile of step {step}: {written}", soft_wrap=True)


def _write(folder: Path, rank: int, profile: torch.profiler.profile, on_cuda: bool) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / f"rank_{rank}.trace.json.gz"))
        if not on_cuda:
            return f"{folder} (a trace only: without CUDA there is no memory snapshot)"
        torch.cuda.memory._dump_snapshot(str(folder / f"rank_{rank}.memory.pickle"))
    except (OSError, RuntimeError) as error:
        return f"could not be written ({error})"
    return f"{folder} (trace and memory snapshot)"
