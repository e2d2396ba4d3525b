"""Predicted times follow from occupancy, bytes and operations; every kernel's work is counted as its tensors say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE  # noqa: F401  (chooses the interpreter for the files that follow)

from sip_engine.kernels import _work
from sip_engine.kernels._gpus import gpu_of, load_gpus
from sip_engine.kernels._predict import LATENCY_S, LAUNCH_S, Work, blocks_per_sm, predict
from sip_engine.kernels._work import work_of
from sip_engine.kernels.compile_report import all_cases
from sip_engine.kernels.shared_prefix_attention import RowLayout, attention_cost

H100 = load_gpus()["h100"]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [
        (32, 0, 4, 16),  # 64 warps
        (64, 0, 4, 8),  # 65,536 registers
        (65, 0, 4, 7),  # 72 of them, by 256 a warp
        (255, 0, 8, 1),
        (32, 0, 1, 32),  # as many blocks as there may be
        (32, 100_000, 4, 2),
        (32, 232_448, 4, 1),  # the most a block can have
    ],
)
def test_blocks_on_a_multiprocessor(registers: int, shared: int, warps: int, blocks: int) -> None:
    """As NVIDIA's occupancy calculator has them for compute capability 9.0."""
    assert blocks_per_sm(registers, shared, warps) == blocks


def seconds(work: Work, registers: int = 64, **options) -> tuple[str, float]:
    found = predict(
        work, H100, num_registers=registers, shared_bytes=0, num_warps=4, tensor_share=1.0, **options
    )
    return found.bound, found.seconds


def test_each_ceiling_by_hand() -> None:
    full = 132 * 8 * 10  # ten whole waves of eight blocks
    copy = Work("", full, H100.copy_bytes_s * 1e-3, in_flight=1e6)
    assert seconds(copy) == ("memory", pytest.approx(1e-3))
    # 1,056 programs that wait for 100 bytes each get 100 bytes a latency each.
    starved = replace(copy, in_flight=100)
    assert seconds(starved) == ("latency", pytest.approx(copy.num_bytes / (1056 * 100 / LATENCY_S)))
    product = replace(copy, tensor_flops=H100.bf16_flops_s * 5e-3)
    assert seconds(product) == ("tensor", pytest.approx(5e-3))
    both = replace(product, scalar=4e-3 * 128 * 132 * 1.7e9)
    assert seconds(both) == ("tensor", pytest.approx(5e-3))
    # One block alone on a multiprocessor does one after the other.
    alone = replace(both, programs=1320)
    assert seconds(alone, registers=512) == ("tensor", pytest.approx(9e-3))
    # 133 programs need two rounds of 132 multiprocessors; 66 leave half of them idle.
    assert seconds(replace(product, programs=133), registers=512)[1] == pytest.approx(5e-3 * 2 / (133 / 132))
    assert seconds(replace(product, programs=66))[1] == pytest.approx(1e-2)
    assert seconds(Work("", 1, 1.0, 1.0))[1] == LAUNCH_S


def test_a_measured_rate_takes_the_place_of_the_tables() -> None:
    measured = (
        "date,machine,rate,value\n"
        "2026-01-02,NVIDIA H200,copy_tb_s,4.1\n2026-01-03,NVIDIA H200,copy_tb_s,4.2\n"
        "2026-01-01,NVIDIA H200,copy_tb_s,4.0\n2026-01-01,NVIDIA H200,decode_attention,0.8\n"
    )
    before, after = load_gpus(), load_gpus(measured)
    assert after["h200"] == replace(before["h200"], copy_tb_s=4.2)
    assert after["h100"] == before["h100"] and gpu_of("NVIDIA H200", measured) == after["h200"]
    work = Work("", 10_560, before["h200"].copy_bytes_s, in_flight=1e6)
    options = {"num_registers": 64, "shared_bytes": 0, "num_warps": 4, "tensor_share": 1.0}
    assert predict(work, after["h200"], **options).seconds == pytest.approx(4.3 / 4.2)
    for line in ("2026-01-01,NVIDIA H200,copy_tb_s,fast", "2026-01-01,NVIDIA H200,copy_tb_s,0"):
        with pytest.raises(ValueError):
            load_gpus(f"date,machine,rate,value\n{line}\n")


def test_work_is_what_the_tensors_hold() -> None:
    cases = {case.name: case for case in all_cases()}
    assert {case.kernel.__name__ for case in cases.values()} == set(_work.WORK)
    for case in cases.values():
        work = work_of(case)
        assert work.programs > 0 and work.num_bytes > 0 and work.in_flight > 0, case.name
    B, G, P, D, heads = _work.B, _work.G, _work.P, 128, 16

    def size(*shape: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return torch.empty(shape, dtype=dtype, device="meta").nbytes

    work = work_of(cases["decode prefix bf16 pages D=128 rows=16"])
    parts = size(2, B, heads, D, dtype=torch.float32) + size(2, B, heads, dtype=torch.float32)
    assert work.num_bytes == 2 * size(B // G, P, heads, D) + parts + size(B, heads, D)
    assert work.tensor_flops == 4 * B * heads * P * D, "G = 16 rows fill the tile: nothing is padding"
    assert work.programs == B // G * heads * 2
    alone = work_of(cases["decode ungrouped bf16 pages D=128 rows=16"])
    assert alone.num_bytes - parts - size(B, heads, D) == 2 * size(B, P, heads, D)
    assert alone.tensor_flops == 16 * work.tensor_flops, "15 of 16 rows are padding"

    layout = RowLayout((P,) * 5, ((_work.S,) * G,) * 5)
    cost = attention_cost(layout, num_heads=heads, head_dim=D)
    forward, dq, dkv = (
        work_of(cases[f"shared_prefix {name} bf16 D=128"]) for name in ("forward", "dq", "dkv")
    )
    assert 1 <= forward.tensor_flops / cost.forward_flops < 1.05
    assert dq.tensor_flops + dkv.tensor_flops == pytest.approx(7 / 5 * cost.backward_flops, rel=0.1)

    stats = work_of(cases["logprob stats bf16"])
    assert stats.tensor_flops == 2 * 16_384 * 2048 * 32_000
    assert work_of(cases["head_sample bf16"]).num_bytes > size(32_000, 2048) + size(B, 2048)
