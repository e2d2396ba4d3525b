"""Kernels compile for sm_90 on any machine, without spills, and the report says so when one does not.

Triton compiles nothing while it interprets, so compilation happens in other processes.
"""

from __future__ import annotations

import pytest
from compile_runs import run_python, run_report
from interpreter import DEVICE  # noqa: F401  (chooses the interpreter for the files that follow)

from sip_engine.kernels import compile_report

BAD_CASES = """
import sys
from dataclasses import replace
from sip_engine.kernels import compile_report
from sip_engine.kernels.rms_norm import compile_cases

good = compile_cases()[0]
spills = replace(good, name="spills", num_warps=1, constexprs=good.constexprs | {"BLOCK_H": 16384})
misses = replace(good, name="misses", expect_wgmma=True)
compile_report.all_cases = lambda: iter([spills, misses])
sys.exit(compile_report.main([]))
"""

OTHER_LAUNCHES = """
from dataclasses import replace
from sip_engine.kernels import kv_write, random, rms_norm, rotary, sample, swiglu
from sip_engine.kernels.compile_report import compile_case

for module in (kv_write, random, rms_norm, rotary, sample, swiglu):
    for case in {case.kernel.__name__: case for case in module.compile_cases()}.values():
        integers = [name for name, kind in case.signature.items() if kind.startswith("i32")]
        ones = {name: kind for name, kind in case.signature.items() if name not in integers}
        odd = {name: kind.split(":")[0] for name, kind in case.signature.items()}
        for other in (
            replace(case, signature=ones, constexprs=case.constexprs | dict.fromkeys(integers, 1)),
            replace(case, signature=odd),
        ):
            try:
                assert compile_case(other).num_registers > 0
            except Exception as error:
                raise SystemExit(f"{case.name} with {other.signature}, {other.constexprs}: {error}")
"""


def rows_of(table: str) -> dict[str, list[str]]:
    """Name of the case -> warps, stages, registers, spilled bytes, shared bytes, wgmma, ..., and BAD if it is."""
    lines = table.splitlines()
    assert lines[0].split()[:3] == ["kernel", "warps", "stages"]
    return {line[:58].strip(): line[58:].split() for line in lines[1:]}


def test_two_kernels_compile_without_spills():
    done = run_report("swiglu", "rotary")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(done.stdout)
    assert sorted(rows) == ["rotary bf16 D=128", "swiglu bf16"]
    for warps, stages, registers, spilled, shared, wgmma, *_ in rows.values():
        assert (warps, stages, spilled, shared, wgmma) == ("4", "3", "0", "0", "no")
        assert 8 <= int(registers) <= 64
    blocks, kilobytes, _, bound, h100, _, h200, *shape = rows["swiglu bf16"][6:]
    assert (float(kilobytes), bound, shape) == (
        round(3 * 5632 * 2 / 6 / 1e3, 1),
        "memory",
        ["[1024,", "5632]"],
    )
    assert int(blocks) == min(16, 65536 // (32 * 4 * -(-int(rows["swiglu bf16"][2]) // 8) * 8))
    assert float(h100) == pytest.approx(3 * 1024 * 5632 * 2 / 3.0e12 * 1e6, rel=0.1)
    assert float(h200) == pytest.approx(float(h100) * 3.0 / 4.3, rel=0.1)


@pytest.mark.slow
def test_spills_and_missing_wgmma_fail():
    done = run_python("-c", BAD_CASES)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 kernels spill registers or miss wgmma" in done.stderr
    rows = rows_of(done.stdout)
    assert int(rows["spills"][3]) > 0 and (rows["spills"][5], rows["spills"][-1]) == ("no", "BAD")
    assert rows["misses"][3] == "0" and (rows["misses"][5], rows["misses"][-1]) == ("no", "BAD")


def test_a_report_on_nothing_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "INTERPRETED", True)
    assert compile_report.main([]) == 2
    assert "TRITON_INTERPRET unset" in capsys.readouterr().err
    monkeypatch.setattr(compile_report, "INTERPRETED", False)
    assert compile_report.main(["no such kernel"]) == 2
    assert "no such kernel" in capsys.readouterr().err


@pytest.mark.slow
def test_every_kernel_compiles_without_spills():
    done = run_report()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(done.stdout)
    for word in (
        "gumbel",
        "rms_norm",
        "rotary",
        "head_sample",
        "merge_tiles",
        "swiglu",
        "kv_write",
        "decode",
        "prefill",
    ):
        assert any(word in name for name in rows), word
    assert rows["head_sample bf16"][5] == "yes"


@pytest.mark.slow
def test_other_launches_compile():
    """Triton compiles anew for an integer that is 1, as a batch of one row has, or no multiple of 16."""
    done = run_python("-c", OTHER_LAUNCHES)
    assert done.returncode == 0, done.stdout + done.stderr
