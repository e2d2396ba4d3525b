"""Items 2, 3, 4 and 12: our kernels compiled, compared with float64, looked at by the memory checker, and timed."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.gpu.case import REAL, SMALL, TINY, KernelCase
from benchmarks.gpu.figures import Context
from benchmarks.gpu.kernel_cases import kernel_cases
from benchmarks.gpu.machine import seconds_of
from benchmarks.gpu.peers import Beside, first_line, largest_gap
from benchmarks.record import ROOT
from sip_engine.kernels.attention_choice import COLUMNS

WARM_UP_PROCESSES = 12


@contextmanager
def poisoned() -> Iterator[None]:
    """Every `torch.empty` begins as NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def warm_up(context: Context) -> None:
    """Compile what the run launches, into Triton's cache, by launching it once in many processes."""
    number = 1 if context.rehearse else WARM_UP_PROCESSES
    if context.rehearse:
        launch(kernel_cases(TINY)[:1])
    else:
        commands = [
            [sys.executable, "-m", "benchmarks.gpu.kernels", "--share", f"{i}/{number}"]
            for i in range(number)
        ]
        with ThreadPoolExecutor(number) as pool:
            done = list(
                pool.map(lambda c: subprocess.run(c, cwd=ROOT, capture_output=True, text=True), commands)
            )
        for process in done:
            if process.returncode:
                last = (process.stderr.strip().splitlines() or ["no output"])[-1]
                context.check("launch variants", False, note=last)
    context.say("processes", number)


def launch(cases: Sequence[KernelCase]) -> None:
    for case in cases:
        case.run(case.make(0))


def exactness(context: Context) -> None:
    """The largest difference from float64, as a share of the largest value; and the bits of a second run."""
    for case in kernel_cases(TINY if context.rehearse else SMALL):
        inputs = case.make(0)
        with poisoned():
            found, again = case.run(inputs), case.run(inputs)
        worst = 0.0
        for ours, exact in zip(found, case.exact(inputs), strict=True):
            exact = exact.double()
            gap = (ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
            worst = max(worst, float("inf") if torch.isnan(ours.double()).any() else gap.item())
        same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        note = "" if same else "two runs differ in bits"
        context.say(
            case.name,
            worst,
            "of the largest",
            target=f"<= {case.error:g}",
            ok=worst <= case.error and same,
            note=note,
        )


def memcheck(context: Context) -> None:
    """Reads and writes out of bounds, by NVIDIA's own tool where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if context.rehearse:
        launch([case for case in kernel_cases(TINY) if case.name in ("gumbel", "SwiGLU")])
        context.say("compute-sanitizer", "rehearsed: kernels run")
        return
    if tool is None:
        context.say("compute-sanitizer", "not installed", note="it comes with the CUDA toolkit")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    # The allocator's own cache would hide what lies just past a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, "-m", "benchmarks.gpu.kernels", "--share", "0/1"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    (context.out / "memcheck.txt").write_text(done.stdout + done.stderr)
    context.check(
        "compute-sanitizer memcheck", done.returncode == 0, note="see memcheck.txt" if done.returncode else ""
    )


def timings(context: Context) -> None:
    """Each kernel at the reference shape beside the compile report's prediction and its peers."""
    sizes = TINY if context.rehearse else REAL
    for case in kernel_cases(sizes):
        if not context.rehearse or case.name in REHEARSED:
            _time(context, case)
    if context.profile:
        _profile(context, kernel_cases(sizes)[0])


REHEARSED = ("decode", "SwiGLU", "logprob, forward and backward")


def _time(context: Context, case: KernelCase) -> None:
    count = 2 if context.rehearse else _rotation(case)
    inputs = [case.make(seed) for seed in range(count)]
    capture = "backward" not in case.name  # autograd's own threads are not captured
    ours = seconds_of([lambda i=i: case.run(i) for i in inputs], graph=capture)
    beside, times = [], {}
    for name, peer in case.peers.items():
        found = _time_beside(case, peer, inputs, capture=capture)
        if isinstance(found, str):
            beside.append(f"{name}: {found}")
        else:
            times[name] = found
            beside.append(f"{name}: {found * 1e6:.1f} us ({found / ours:.2f} x ours)")
    _note_choice(context, case, ours, times)
    _note_rate(context, case, ours)
    target, ok = _judged(case, ours, times)
    context.say(
        case.name,
        ours * 1e6,
        "us",
        predicted=context.predicted_us(case.predicted),
        target=target,
        peer="; ".join(beside),
        ok=ok or context.rehearse,
    )


def _time_beside(case: KernelCase, peer: Beside, inputs: list[Any], *, capture: bool) -> float | str:
    """Seconds of a call, once its results have been found to be ours; or why there are none."""
    missing = peer.missing()
    if missing:
        return missing
    try:
        calls = [peer.prepare(i) for i in inputs]
        if peer.of_ours is not None:
            gap = largest_gap(calls[0](), peer.of_ours(case.run(inputs[0])))
            if not gap <= 2 * case.error:  # each is as far as that from float64
                return f"differs by {gap:.2g} of the largest, not timed"
        return seconds_of(calls, graph=capture and peer.capture)
    except Exception as error:  # whatever another library raises, ours has been measured
        return first_line(error)


def _note_choice(context: Context, case: KernelCase, ours: float, peers: dict[str, float]) -> None:
    """A line for the table that attention is chosen by, of whatever could be chosen and was measured."""
    times = (
        {case.choice[1][name]: peers[name] for name in case.choice[1] if name in peers} if case.choice else {}
    )
    if not times or case.choice is None:
        return
    times["triton"] = ours
    path, on = context.out / "attention.csv", f"{torch.cuda.get_device_name()} {datetime.now(UTC):%Y-%m-%d}"
    head = "" if path.exists() else ",".join(COLUMNS) + "\n"
    fastest = min(times, key=lambda impl: times[impl])
    with path.open("a", encoding="utf-8") as file:
        file.write(
            head + ",".join(map(str, (*vars(case.choice[0]).values(), fastest, on.replace(",", " ")))) + "\n"
        )


def _note_rate(context: Context, case: KernelCase, ours: float) -> None:
    """Grouped decode's share of the copy rate, which plans go by."""
    if case.name == "decode" and context.ceilings is not None:
        num_bytes = context.predicted_bytes(case.predicted)
        context.measured_rate("decode_attention", num_bytes / ours / context.ceilings.copy_bytes_s)


def _judged(case: KernelCase, ours: float, times: dict[str, float]) -> tuple[str, bool]:
    """The target, which is held against the first peer, and whether it is met."""
    peer = times.get(next(iter(case.peers), ""))
    if case.target is None or peer is None:
        return "", True
    if case.target > 0:
        return f">= {case.target:g} x {next(iter(case.peers))}", peer / ours >= case.target
    return f"<= {-case.target:g} x {next(iter(case.peers))}", ours / peer <= -case.target


def _rotation(case: KernelCase) -> int:
    """Inputs enough that together they are several times the cache."""
    tensors = case.make(0)
    values = (
        tensors.values()
        if isinstance(tensors, dict)
        else tensors
        if isinstance(tensors, tuple)
        else (tensors,)
    )
    size = sum(x.nbytes for x in values if isinstance(x, torch.Tensor))
    return max(2, min(16, 4 * 50 * 2**20 // max(1, size)))


def _profile(context: Context, case: KernelCase) -> None:
    """A trace of torch's profiler, and where `ncu` is, memory and tensor-pipe figures of our kernels."""
    from torch.profiler import ProfilerActivity, profile

    inputs = case.make(0)
    activities = [ProfilerActivity.CPU] + ([] if context.rehearse else [ProfilerActivity.CUDA])
    with profile(activities=activities) as trace:
        case.run(inputs)
        torch.cuda.synchronize()
    trace.export_chrome_trace(str(context.out / "kernel_trace.json"))
    context.say("profile", "kernel_trace.json")
    ncu = shutil.which("ncu")
    if ncu is None or context.rehearse:
        context.say("ncu", "not installed" if ncu is None else "not run in a rehearsal")
        return
    metrics = "dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__inst_executed_pipe_tensor.sum"
    command = [
        ncu,
        "--metrics",
        metrics,
        "--csv",
        sys.executable,
        "-m",
        "benchmarks.gpu.kernels",
        "--share",
        "0/1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (context.out / "ncu.csv").write_text(done.stdout)
    context.say("ncu", "ncu.csv", note="" if done.returncode == 0 else done.stderr.strip()[-200:])


def main(argv: Sequence[str] | None = None) -> int:
    """Launch a share of all kernels once: for the warm-up, the memory checker and ncu."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--share", default="0/1", help="I/N: every Nth case from the Ith on")
    first, _, number = parser.parse_args(argv).share.partition("/")
    cases: list[Any] = [
        *kernel_cases(SMALL),
        *kernel_cases(replace(SMALL, dtype=torch.float32, pages=torch.float32)),
    ]
    if number != "1":
        cases += kernel_cases(REAL)
    launch(cases[int(first) :: int(number)])
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
