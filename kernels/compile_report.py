"""Compile every kernel for sm_90 without a GPU: registers, spills, shared memory, wgmma, and what time to expect.

Run `python -m sip_engine.kernels.compile_report [WORD ...] [--json FILE] [--rates FILE]`: all cases, or those whose
name has one of the words in it. Behind what the compiler says stand the blocks that a multiprocessor holds, bytes and
operations of a program, what bounds the kernel, and its time on an H100 and an H200 at the reference shapes
(`_work.py`): predicted by the formulas of `_predict.py` from the rates of `gpus.toml`, or a file's, and not measured.
It exits with 1 if a kernel spills registers, needs more shared memory than a block can have, or should use wgmma and
does not. A kernel file takes part by having a function `compile_cases() -> list[CompileCase]`, and its kernel an
entry in `_work.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sip_engine.kernels
from sip_engine.kernels._gpus import GPU, MEASURED, load_gpus
from sip_engine.kernels._predict import MMA_SHARE, TF32X3_SHARE, Prediction, Work, predict
from sip_engine.kernels._triton import HAS_TRITON, INTERPRETED
from sip_engine.kernels._work import work_of

NUM_COMPUTE_CAPABILITY = 90
WARP_SIZE = 32
MAX_SHARED_BYTES = 232_448
"""Of a thread block at compute capability 9.0 (CUDA C++ Programming Guide, technical specifications: 227 KiB)."""


@dataclass(frozen=True)
class CompileCase:
    """One configuration of one kernel."""

    name: str
    """What the table calls it, such as "rms_norm bf16 H=2048"."""
    kernel: Any
    """The `@jit` function."""
    signature: dict[str, str]
    """Triton type of every argument that is not a constexpr, such as "*bf16", "fp32", "i32". The suffix ":16"
    says that the pointer or integer is a multiple of 16, which a launch finds out by itself."""
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    expect_wgmma: bool = False
    """Whether the tensor cores must be used through wgmma."""


@dataclass(frozen=True)
class CompileResult:
    """What the compiler made of a case."""

    case: CompileCase
    num_registers: int
    """Per thread."""
    spill_bytes: int
    """Stack of a thread in bytes; our kernels keep nothing there but spilled registers."""
    shared_bytes: int
    """Shared memory of a thread block."""
    uses_wgmma: bool

    @property
    def ok(self) -> bool:
        """No spills, shared memory that a block can have, and wgmma where it is expected."""
        fits = self.shared_bytes <= MAX_SHARED_BYTES
        return self.spill_bytes == 0 and fits and (self.uses_wgmma or not self.case.expect_wgmma)

    @property
    def work(self) -> Work:
        """Of the kernel at the reference shape."""
        return work_of(self.case)

    def predicted(self, gpu: GPU) -> Prediction:
        """For the reference shape, on a GPU of compute capability 9.0."""
        wide = any(
            kind.startswith("*fp32") for name, kind in self.case.signature.items() if name in _OPERANDS
        )
        return predict(
            self.work,
            gpu,
            num_registers=self.num_registers,
            shared_bytes=self.shared_bytes,
            num_warps=self.case.num_warps,
            tensor_share=TF32X3_SHARE if wide else 1.0 if self.uses_wgmma else MMA_SHARE,
        )

    def as_json(self, gpus: Sequence[GPU]) -> dict[str, Any]:
        """All that the report says of the case."""
        times = {gpu.machine: self.predicted(gpu) for gpu in gpus}
        return {
            "kernel": self.case.name,
            "shape": self.work.shape,
            "num_warps": self.case.num_warps,
            "num_stages": self.case.num_stages,
            "registers": self.num_registers,
            "spill_bytes": self.spill_bytes,
            "shared_bytes": self.shared_bytes,
            "wgmma": self.uses_wgmma,
            "programs": self.work.programs,
            "bytes": self.work.num_bytes,
            "tensor_flops": self.work.tensor_flops,
            "blocks_per_sm": next(iter(times.values())).blocks_per_sm,
            "bound": {gpu: found.bound for gpu, found in times.items()},
            "predicted_us": {gpu: round(found.seconds * 1e6, 2) for gpu, found in times.items()},
        }


_OPERANDS = ("q_ptr", "hidden_ptr", "b_ptr")
"""Arguments that a kernel multiplies on the tensor cores."""


def all_cases() -> Iterator[CompileCase]:
    """The cases of every module in this package, in the order of the modules' names."""
    for module in pkgutil.iter_modules(sip_engine.kernels.__path__):
        if not module.name.startswith("_"):
            loaded = importlib.import_module(f"sip_engine.kernels.{module.name}")
            yield from getattr(loaded, "compile_cases", list)()


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as the cubin itself states them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert found, f"cuobjdump printed no resource usage: {listing}"
    return int(found[1]), int(found[2])


def compile_case(case: CompileCase) -> CompileResult:
    """Compile one case for sm_90. Raises Triton's CompilationError if it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    attributes = {}
    for index, name in enumerate(case.kernel.arg_names):
        kind, _, multiple = case.signature.get(name, "constexpr").partition(":")
        signature[name] = kind
        if multiple:
            attributes[(index,)] = [["tt.divisibility", int(multiple)]]
    compiled = triton.compile(
        ASTSource(case.kernel, signature, case.constexprs, attributes),
        target=GPUTarget("cuda", NUM_COMPUTE_CAPABILITY, WARP_SIZE),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    num_registers, stack_bytes = _resource_usage(compiled.asm["cubin"])
    return CompileResult(
        case=case,
        num_registers=num_registers,
        spill_bytes=stack_bytes,
        shared_bytes=compiled.metadata.shared,
        uses_wgmma="wgmma.mma_async" in compiled.asm["ptx"],
    )


def _gpus(rates: Path | None) -> list[GPU]:
    """Those that the cases are compiled for, with measured rates where a file has some."""
    path = rates or MEASURED
    text = path.read_text(encoding="utf-8") if rates or path.exists() else ""
    return [gpu for gpu in load_gpus(text).values() if gpu.compute_capability == NUM_COMPUTE_CAPABILITY]


def _line(result: CompileResult, gpus: Sequence[GPU]) -> str:
    case, work = result.case, result.work
    times = [result.predicted(gpu) for gpu in gpus]
    tensor = work.tensor_flops / work.programs / 1e6
    return (
        f"{case.name:<58}{case.num_warps:>6}{case.num_stages:>7}{result.num_registers:>10}"
        f"{result.spill_bytes:>8}{result.shared_bytes:>9}  {'yes' if result.uses_wgmma else 'no':<5}"
        f"{times[0].blocks_per_sm:>7}{work.num_bytes / work.programs / 1e3:>9.1f}{tensor:>9.1f}"
        + "".join(f"  {time.bound:<10}{time.seconds * 1e6:>9.1f}" for time in times)
        + f"  {work.shape}{'' if result.ok else '  BAD'}"
    )


def main(arguments: Sequence[str]) -> int:
    """Print one line a case. Returns the exit status: 0 good, 1 a case is not ok, 2 nothing was compiled."""
    parser = argparse.ArgumentParser(prog="python -m sip_engine.kernels.compile_report", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="cases with one of these in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there, too")
    parser.add_argument("--rates", type=Path, metavar="FILE", help=f"measured rates; default: {MEASURED}")
    args = parser.parse_args(arguments)
    if not HAS_TRITON or INTERPRETED:
        print("compile_report needs the triton package, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    try:
        gpus = _gpus(args.rates)
    except (OSError, ValueError) as error:
        print(f"{args.rates or MEASURED}: {error}", file=sys.stderr)
        return 2
    cases = [case for case in all_cases() if not args.words or any(word in case.name for word in args.words)]
    if not cases:
        print(f"no case has any of {', '.join(args.words)} in its name", file=sys.stderr)
        return 2
    print(
        f"{'kernel':<58}{'warps':>6}{'stages':>7}{'registers':>10}{'spill B':>8}{'shared B':>9}  wgmma"
        f"{'blk/SM':>7}{'kB/tile':>9}{'Mop/tile':>9}"
        + "".join(f"  {gpu.machine + ' bound':<10}{'us':>9}" for gpu in gpus)
        + "  at (predicted, not measured)"
    )
    results = []
    for case in cases:
        results.append(compile_case(case))
        print(_line(results[-1], gpus), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps([result.as_json(gpus) for result in results], indent=1) + "\n")
    num_bad = sum(not result.ok for result in results)
    if num_bad:
        print(f"{num_bad} kernels spill registers or miss wgmma", file=sys.stderr)
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
