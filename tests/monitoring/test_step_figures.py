"""What a step is measured by: operations as a plan counts them, rates, money, memory by part, joules by NVML."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, small_run
from world_runs import run_config

from sip_engine.accounting import work
from sip_engine.accounting.hardware import peak_bf16
from sip_engine.accounting.shape import Shape
from sip_engine.accounting.useful import generation_flops, training_flops
from sip_engine.accounting.workload import Workload
from sip_engine.config.judge import JudgeConfig
from sip_engine.config.schema import ParallelConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.monitoring.meters import EnergyMeter
from sip_engine.monitoring.records import read_records
from sip_engine.monitoring.step_memory import held_bytes, memory_metrics
from sip_engine.monitoring.throughput import StepWork, speeds
from sip_engine.policy.policy import Policy
from sip_engine.policy.rows import Row
from sip_engine.train import train
from sip_engine.types import Cost

SHAPE = Shape(SMALL_MODEL, ParallelConfig(), 400)


def test_real_lengths_add_up_to_a_plans_means() -> None:
    """Where all lengths are equal, a step's counts are those of the plan's phases."""
    cfg = small_run(objective={"kind": "dpo"})
    load = Workload(5, 20, 20, 12, 3, 3, 2, scores_prefix=False, needs_reference=True)
    sampled = work.prefill(SHAPE, 5, 20).flops + work.decode(SHAPE, 15, 3, 20, 12, "auto").flops
    assert 5 * generation_flops(SHAPE, 20, [12, 12, 12]) == pytest.approx(sampled)
    trained = work.update(cfg, SHAPE, load).flops
    assert 5 * training_flops(SHAPE, 20, [12, 12], 24, reference=False) == pytest.approx(trained)
    both = trained + work.reference(cfg, SHAPE, load).flops
    assert 5 * training_flops(SHAPE, 20, [12, 12], 24, reference=True) == pytest.approx(both)


def test_a_step_counts_what_it_wrote_and_what_it_learnt_from() -> None:
    step = StepWork(small_run(objective={"kind": "dpo"}), 400)
    step.sampled(20, [12, 7])
    step.sampled(20, [])
    ids = np.arange(30, dtype=np.int32)
    step.trained([Row(ids[:20], (ids[:12], ids[:7]))])
    step.judged = Cost(3, 100, 0.0, 40)
    tokens, flops, *judged = step.totals()
    assert tokens == 19 + 39 and judged == [3, 100, 40]
    wanted = generation_flops(SHAPE, 20, [12, 7]) + training_flops(SHAPE, 20, [12, 7], 19, reference=True)
    assert flops == wanted


def test_rates_utilisation_and_money() -> None:
    judge = JudgeConfig(price_read=2.0, price_written=10.0)
    totals = [1000, 989e12, 30, 5e6, 1e6]
    found = speeds(totals, 2.0, 4, "NVIDIA H100 80GB HBM3", judge)
    assert found["machine/tokens_per_second"] == 500 and found["machine/model_tflop_s"] == 494.5
    assert found["machine/mfu"] == pytest.approx(1 / 8)
    assert found["judge/dollars"] == pytest.approx(4 * 2 + 1 * 10)
    assert peak_bf16("NVIDIA L4") is None
    plain = speeds([*totals[:2], 0, 0, 0], 2.0, 4, "cpu", JudgeConfig())
    assert set(plain) == {"machine/step_seconds", "machine/tokens_per_second", "machine/model_tflop_s"}


def test_memory_by_part(mesh: Mesh) -> None:
    policy = Policy(small_run(), 400, mesh)
    size = sum(parameter.numel() for parameter in policy.model.parameters())
    parts = held_bytes(policy, None, None)
    assert parts["weights"] == pytest.approx(4 * size, rel=0.01)
    assert parts["gradients"] == pytest.approx(4 * size, rel=0.01)
    assert parts["optimizer"] == pytest.approx(
        8 * size, rel=0.01
    )  # two moments; fp32 weights need no master copy
    assert parts["reference"] == parts["kv"] == 0


def test_what_stands_beside_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts = {"weights": 2**30, "gradients": 2**30, "optimizer": 2**31, "reference": 0, "kv": 2**31}
    kept = memory_metrics(9 * 2**30, parts, kv_stays=True)
    assert kept["machine/memory_peak_gib"] == 9 and kept["machine/memory_other_gib"] == 3
    assert memory_metrics(9 * 2**30, parts, kv_stays=False)["machine/memory_other_gib"] == 5


def test_joules_are_nvmls_own(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter([1_000_000, 1_250_000])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter) if handle == b"GPU-7" else 1 / 0,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="7"))
    meter = EnergyMeter()
    assert meter.joules() == 250.0
    assert meter.joules() is None  # the counter has gone: nothing is made up


def test_a_run_records_them_at_every_step(mesh: Mesh, tmp_path: Path) -> None:
    cfg = run_config(tmp_path, steps=2, judge={"backend": "world", "price_read": 1.0})
    train(cfg, mesh)
    steps = [row for row in read_records(cfg.out / "metrics.jsonl") if "loss" in row]
    for row in steps:
        assert row["machine/tokens_per_second"] * row["machine/step_seconds"] == pytest.approx(
            round(row["machine/tokens_per_second"] * row["machine/step_seconds"])
        )
        assert row["judge/calls"] == pytest.approx(row["judge/calls_per_prefix"] * cfg.batch_size)
        assert row["judge/dollars"] == 0.0 and row["judge/tokens"] == 0  # the world's truth reads no tokens
        assert row["machine/memory_resident_gib"] > row["machine/memory_weights_gib"] > 0
        assert "machine/mfu" not in row and "machine/joules" not in row
