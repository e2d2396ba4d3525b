"""The log-prob head beside torch, Liger and cut-cross-entropy: time over the bare GEMM, and memory, in one run.

Passes: "forward" - log-probs of the targets, nothing kept; "both" - mean NLL and its gradients of hidden states
and weights. The bare GEMM is one product of the same shapes forward, three for both. Implementations take turns,
on new hidden states and targets each round; what the last round gave is compared with float64 before anything is
written. Liger computes gradients in its forward pass whenever they are wanted, so its "forward" is without them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import RESULTS, header, write_csv
from sip_engine.kernels.logprob_head import logprob_head

OURS = ("chunked", "triton")
TARGET_RATIO, TARGET_MEMORY = 1.15, 0.01
MAX_ERROR = {"bf16": 2e-2, "fp32": 1e-4}
"""Of the mean NLL in nats, and of gradients relative to their norm; ours must keep it."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PASSES = ("forward", "both")

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [N, H], weight [V, H], targets [N]) -> mean NLL."""


@dataclass
class Entrant:
    """One implementation and what was measured of it."""

    name: str
    head: Head
    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    results: tuple[Tensor, ...] = ()
    failure: str = ""


def torch_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What one writes without a fused head: logits, rounded to the inputs' dtype, then float32."""
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def own_head(hidden: Tensor, weight: Tensor, targets: Tensor, impl: Any) -> Tensor:
    return -logprob_head(hidden, weight, targets, impl=impl).mean()


def entrants(device: str) -> list[Entrant]:
    """Those that run on `device`; what is missing is said."""
    found = [Entrant("torch", torch_head), Entrant("chunked", partial(own_head, impl="chunked"))]
    if device != "cuda":
        print("without CUDA: no Triton kernel, Liger or cut-cross-entropy")
        return found
    found.append(Entrant("triton", partial(own_head, impl="triton")))
    try:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )

        liger = LigerFusedLinearCrossEntropyLoss()
        found.append(Entrant("liger", lambda hidden, weight, targets: liger(weight, hidden, targets)))
    except ImportError as error:
        print(f"no Liger: {error}")
    try:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        # "cce" leaves out gradients below a threshold; "cce_exact" computes them all, as the others do.
        exactly = partial(linear_cross_entropy, filter_eps=None)
        found += [Entrant("cce", linear_cross_entropy), Entrant("cce_exact", exactly)]
    except ImportError as error:
        print(f"no cut-cross-entropy: {error}")
    return found


def run_head(
    head: Head, backward: bool, hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    """The mean NLL and, with `backward`, the gradients of hidden and weight."""
    if not backward:
        with torch.no_grad():
            return (head(hidden, weight, targets),)
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = head(hidden, weight, targets)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def exact(backward: bool, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """`run_head` of torch's own cross-entropy in float64, as many tokens at a time as make 2^26 logits."""
    wide_weight = weight.double().requires_grad_(backward)
    loss, d_hidden = torch.zeros((), dtype=torch.float64, device=hidden.device), []
    step = max(1, (1 << 26) // len(weight))
    for rows in (slice(start, start + step) for start in range(0, len(hidden), step)):
        wide_hidden = hidden[rows].double().requires_grad_(backward)
        part = F.cross_entropy(wide_hidden @ wide_weight.T, targets[rows], reduction="sum") / len(hidden)
        loss += part.detach()
        if backward:
            part.backward()
            d_hidden.append(wide_hidden.grad)
    if not backward:
        return (loss,)
    assert wide_weight.grad is not None
    return loss, torch.cat(d_hidden), wide_weight.grad


def run_gemm(backward: bool, hidden: Tensor, weight: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    """The products that no implementation can do without."""
    logits = hidden @ weight.T
    return (logits @ weight, logits.T @ hidden) if backward else (logits,)


def timed(action: Callable[[], tuple[Tensor, ...]], device: str) -> tuple[float, tuple[Tensor, ...]]:
    """Milliseconds of `action`, and what it returned."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        results = action()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), results
    start = time.perf_counter_ns()
    results = action()
    return (time.perf_counter_ns() - start) / 1e6, results


def peak_extra_bytes(action: Callable[[], tuple[Tensor, ...]], device: str) -> int:
    """Most memory that `action` holds at a time, less what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = action()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            results = action()
        assert profile.profiler is not None and profile.profiler.kineto_results is not None
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        sizes = [e.nbytes() for e in events]  # pyright: ignore[reportAttributeAccessIssue]
        peak = int(np.cumsum([0, *sizes]).max())
    return peak - sum(x.nbytes for x in results)


def measure(
    found: Iterable[Entrant],
    backward: bool,
    rounds: int,
    weight: Tensor,
    draw: Callable[[], tuple[Tensor, Tensor]],
) -> tuple[list[float], tuple[Tensor, Tensor]]:
    """Fill in `found`. Returns the GEMM's milliseconds, and hidden and targets of the last round."""
    device, gemm = weight.device.type, []
    runs = [(None, partial(run_gemm, backward)), *((e, partial(run_head, e.head, backward)) for e in found)]
    hidden, targets = draw()
    for entrant, run in runs:  # compiles, warms up, and finds who does not fit
        action = partial(run, hidden, weight, targets)
        try:
            action()
            if entrant is not None:
                entrant.peak_bytes = peak_extra_bytes(action, device)
        except Exception as error:
            if entrant is None or (entrant.name in OURS and not isinstance(error, torch.OutOfMemoryError)):
                raise
            entrant.failure = type(error).__name__
            print(f"{entrant.name}: {error}")
    for _ in range(rounds):
        hidden, targets = draw()
        for entrant, run in runs:
            if entrant is None:
                gemm.append(timed(partial(run, hidden, weight, targets), device)[0])
            elif not entrant.failure:
                entrant.results = ()
                elapsed, entrant.results = timed(partial(run, hidden, weight, targets), device)
                entrant.milliseconds.append(elapsed)
    return gemm, (hidden, targets)


def errors(results: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[float, float]:
    """Of the mean NLL in nats, and the largest of a gradient relative to its norm (0 without gradients)."""
    relative = [
        ((ours.double() - wanted).norm() / wanted.norm()).item()
        for ours, wanted in zip(results[1:], right[1:], strict=True)
    ]
    return abs(results[0].item() - right[0].item()), max(relative, default=0.0)


def rows_of(
    found: Iterable[Entrant], name: str, gemm: list[float], right: tuple[Tensor, ...], logits_bytes: int
) -> list[dict[str, object]]:
    """CSV rows of a pass, the GEMM's first."""
    gemm_p50 = float(np.median(gemm))
    rows = []
    for entrant in (Entrant("gemm", torch_head, gemm), *found):
        row: dict[str, object] = {"pass": name, "impl": entrant.name, "num_timed": len(entrant.milliseconds)}
        blank = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "ratio_to_gemm"), "")
        if entrant.milliseconds:
            p20, p50, p80 = np.percentile(entrant.milliseconds, (20, 50, 80)).round(3).tolist()
            blank = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "ratio_to_gemm": round(p50 / gemm_p50, 3)}
        row |= blank
        measured = entrant.results and not entrant.failure
        nll_error, grad_error = errors(entrant.results, right) if measured else ("", "")
        row["peak_extra_bytes"] = entrant.peak_bytes if measured else ""
        row["share_of_logits"] = round(entrant.peak_bytes / logits_bytes, 6) if measured else ""
        rows.append({**row, "nll_error": nll_error, "grad_error": grad_error, "failure": entrant.failure})
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    """One line a row; ours are held against the targets."""
    columns = ("p20_ms", "p50_ms", "p80_ms", "ratio_to_gemm", "peak_extra_bytes", "share_of_logits")
    print(f"{'pass':9}{'impl':11}" + "".join(f"{column:>17}" for column in columns))
    for row in rows:
        line = f"{row['pass']:9}{row['impl']:11}" + "".join(f"{row[c]!s:>17}" for c in columns)
        if row["impl"] == "triton" and row["pass"] == "forward":
            for column, target in (("ratio_to_gemm", TARGET_RATIO), ("share_of_logits", TARGET_MEMORY)):
                met = float(str(row[column])) <= target
                line += f"  {column} target {target:g} {'met' if met else 'MISSED'}"
        print(line + f"  {row['failure']}")


def check(rows: list[dict[str, object]], tolerance: float) -> None:
    """RuntimeError if ours is wrong."""
    for row in rows:
        wrong = max(float(str(row[c] or 0)) for c in ("nll_error", "grad_error"))
        if row["impl"] in OURS and not wrong <= tolerance:
            raise RuntimeError(f"{row['impl']} {row['pass']}: error {wrong:g} is above {tolerance:g}")


def versions() -> dict[str, str]:
    """Of the packages measured; "none" where one is not installed."""
    names = ("triton", "liger-kernel", "cut-cross-entropy")
    installed = {each.name for each in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) if name in installed else "none" for name in names}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options; sizes default to limits.md's on CUDA, and to a second of work on a CPU."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks logprob", description="The log-prob head.")
    parser.add_argument("--tokens", type=int, default=65_536 if cuda else 1024)
    parser.add_argument("--hidden", type=int, default=2048 if cuda else 256)
    parser.add_argument("--vocab", type=int, default=128_000 if cuda else 8192)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--rounds", type=int, default=10 if cuda else 5, help="timed calls of each")
    parser.add_argument("--only", nargs="+", metavar="IMPL", help="implementations to run; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS / f"logprob_{'gpu' if cuda else 'cpu'}.csv")
    args = parser.parse_args(argv)
    if min(args.tokens, args.hidden, args.vocab, args.rounds) < 1:
        parser.error("--tokens, --hidden, --vocab and --rounds must be at least 1")
    args.device = "cuda" if cuda else "cpu"
    return args


def main(argv: Sequence[str]) -> int:
    """Measure, print a table, write the CSV file. Returns the exit status."""
    args = parse(argv)
    dtype, device = DTYPES[args.dtype], args.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    def draw() -> tuple[Tensor, Tensor]:
        targets = torch.randint(args.vocab, (args.tokens,), generator=generator, device=device)
        return normal(args.tokens, args.hidden), targets

    weight = normal(args.vocab, args.hidden, scale=2 / args.hidden**0.5)
    logits_bytes = args.tokens * args.vocab * (4 + (0 if dtype == torch.float32 else dtype.itemsize))
    rows = []
    for name in PASSES:
        found = [e for e in entrants(device) if not args.only or e.name in args.only]
        gemm, (hidden, targets) = measure(found, name == "both", args.rounds, weight, draw)
        right = exact(name == "both", hidden, weight, targets)
        rows += rows_of(found, name, gemm, right, logits_bytes)
    print_table(rows)
    check(rows, MAX_ERROR[args.dtype])
    run = {
        **header("logprob"),
        **versions(),
        "num_threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in ("tokens", "hidden", "vocab", "dtype")},
    }
    write_csv(args.out, [{**run, **row} for row in rows])
    return 0
