"""Compile every kernel for sm_90 without a GPU and report registers, spills, shared memory and wgmma.

Run `python -m sip_engine.kernels.compile_report [WORD ...]`: all cases, or those whose name has one of the
words in it. It exits with 1 if a kernel spills registers, needs more shared memory than a block can have, or
should use wgmma and does not. A kernel file takes part by having a function `compile_cases() -> list[CompileCase]`.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sip_engine.kernels
from sip_engine.kernels._triton import HAS_TRITON, INTERPRETED

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


def main(words: Sequence[str]) -> int:
    """Print one line a case. Returns the exit status: 0 good, 1 a case is not ok, 2 nothing was compiled."""
    if not HAS_TRITON or INTERPRETED:
        print("compile_report needs the triton package, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    cases = [case for case in all_cases() if not words or any(word in case.name for word in words)]
    if not cases:
        print(f"no case has any of {', '.join(words)} in its name", file=sys.stderr)
        return 2
    print(f"{'kernel':<58}{'warps':>6}{'stages':>7}{'registers':>10}{'spill B':>8}{'shared B':>9}  wgmma")
    num_bad = 0
    for case in cases:
        result = compile_case(case)
        num_bad += not result.ok
        print(
            f"{case.name:<58}{case.num_warps:>6}{case.num_stages:>7}{result.num_registers:>10}"
            f"{result.spill_bytes:>8}{result.shared_bytes:>9}  {'yes' if result.uses_wgmma else 'no':<5}"
            f"{'' if result.ok else ' BAD'}",
            flush=True,
        )
    if num_bad:
        print(f"{num_bad} kernels spill registers or miss wgmma", file=sys.stderr)
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
