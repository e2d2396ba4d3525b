"""Plans: rates and times against closed figures, what fits, sweeps, bad input, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sip_engine.accounting import memory, work
from sip_engine.accounting.hardware import Hardware, Overheads, Shares, load_hardware, load_judge
from sip_engine.accounting.shape import Shape
from sip_engine.accounting.workload import Judging, num_comparisons, workload_of
from sip_engine.cli import app, main
from sip_engine.config.judge import JudgeConfig
from sip_engine.config.model import ModelConfig
from sip_engine.config.overrides import read_run_config
from sip_engine.config.schema import ParallelConfig, RunConfig
from sip_engine.judges.schedules.open import make_schedule
from sip_engine.judges.schedules.tournament import tournament_budget
from sip_engine.planning.plan import DoesNotFitError, Request, make_plan
from sip_engine.planning.sweep import sweep
from sip_engine.planning.timing import collective_seconds, phase_of, server_judge
from sip_engine.utils.errors import ConfigError, DataError

MODEL = ModelConfig(
    num_layers=24, hidden_size=2048, num_heads=16, num_kv_heads=16, ffn_size=5632, precision="bf16"
)
CONFIG = """
batch_size = 256
[model]
num_layers = 24
hidden_size = 2048
num_heads = 16
num_kv_heads = 16
ffn_size = 5632
precision = "bf16"
[data]
path = "documents"
vocab_size = 32000
max_prefix_tokens = 1024
min_prefix_tokens = 1024
[[candidates]]
original = false
rollouts = 16
[sampler]
kv_memory_mb = 12000
max_sequences = 256
[parallel]
distributed_optimizer = true
"""


def test_pages_that_come_and_go_take_turns_with_activations(config: Path) -> None:
    """kv_memory_mb = "auto": the pages are gone while the update runs."""
    held, turns = (
        make_plan(
            read_run_config(config, ["--sampler.kv_memory_mb", size]), Request(load_hardware("h100"), 1)
        ).memory
        for size in ("12000", "auto")
    )
    standing = held.total - held.kv - held.activations
    assert turns.kv == pytest.approx(0.8 * (load_hardware("h100").memory - standing))
    assert turns.activations == held.activations
    assert turns.total == pytest.approx(standing + max(turns.kv, turns.activations))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def cfg(config: Path) -> RunConfig:
    import tomllib

    return RunConfig.model_validate(tomllib.loads(config.read_text()))


def roof(name: str = "h100") -> Hardware:
    """A GPU whose kernels reach all of its rates at once, without overheads."""
    found = load_hardware(name, measured=Path("none"))
    return Hardware(
        name,
        found.gpu,
        Shares(**dict.fromkeys(Shares.model_fields, 1.0)),
        Overheads(**dict.fromkeys(Overheads.model_fields, 0.0) | {"storage_gb_s": 1.0}),
    )


def request_of(nodes: int = 8, **changes: Any) -> Request:
    return Request(load_hardware("h100", measured=Path("none")), nodes, **changes)


def test_decode_bytes_of_the_reference_model() -> None:
    """4,096 sequences, P = 1024, G = 16: 106 GB a step with the prefix read once, 879 without (by hand)."""
    shape = Shape(MODEL, ParallelConfig(), 32000)
    assert shape.kv_bytes("auto") == 192 * 1024
    shared, alone = (work.decode(shape, 4096, g, 1024, 128, "auto").bytes / 127 for g in (16, 1))
    assert shared == pytest.approx(106e9, rel=0.005)
    assert alone == pytest.approx(879e9, rel=0.005)


def test_decode_reads_fp8_weights_at_a_byte() -> None:
    """Memory and time by the same count: 24 layers of 4 x 2048^2 + 3 x 2048 x 5632 parameters (by hand)."""

    def of(sampler: dict[str, Any], fp8: dict[str, Any]) -> tuple[float, int, float]:
        model = MODEL.model_copy(update={"precision": "fp8"}).model_dump() | {"fp8": fp8}
        cfg = RunConfig.model_validate({"model": model, "sampler": sampler})
        found = make_plan(cfg, request_of())
        shape = Shape(cfg.model, ParallelConfig(), 32000)
        layers = memory.sampler_fp8_layers(cfg, shape)
        read = work.decode(shape, 16, 16, 8, 2, "auto", fp8_layers=layers).bytes
        seconds = next(phase.seconds for phase in found.phases if phase.name == "decode")
        return read, memory.fp8_cache_bytes(cfg, shape, samples=True), seconds

    blockwise = {"recipe": "blockwise"}
    plain, followed = of({"fp8_weights": "off"}, blockwise), of({}, blockwise)
    layer = 4 * 2048**2 + 3 * 2048 * 5632
    assert plain[0] - followed[0] == followed[1] - plain[1] == 24 * layer
    assert followed[2] < plain[2]
    assert of({}, {"recipe": "delayed"}) == plain, "its scales are the trainer's alone"
    ends = of({}, {"recipe": "current", "bf16_ends": True})
    assert plain[0] - ends[0] == 22 * layer


def test_a_step_of_one_gpu_at_the_roof() -> None:
    """256 prefixes x 16 x 128 at P = 1024 took 11.4 s by hand, with rates as measured on an H100."""
    shape, gpu = Shape(MODEL, ParallelConfig(), 32000), roof()
    cfg = RunConfig.model_validate(
        {"model": MODEL, "data": {"vocab_size": 32000, "max_prefix_tokens": 1024, "min_prefix_tokens": 1024}}
    )
    load = workload_of(cfg, 1, rollouts=16)
    waves = [
        work.prefill(shape, 256, 1024),
        work.decode(shape, 256 * 16, 16, 1024, 128, "auto"),
        work.reference(cfg, shape, load),
        work.update(cfg, shape, load),
    ]
    seconds = sum(phase_of(w, gpu, launches_per_layer=0).seconds for w in waves)
    assert seconds == pytest.approx(11.4, rel=0.1)


def test_what_bounds_a_phase() -> None:
    gpu = roof()
    operations = work.Work("x", (work.Piece(1e15, bytes=1e9),))
    moved = work.Work("x", (work.Piece(1e9, bytes=1e13),))
    sent = work.Work("x", (work.Piece(1e9),), (work.Collective("all_reduce", 8, 1e12, 1),))
    found = [phase_of(w, gpu, launches_per_layer=0) for w in (operations, moved, sent)]
    assert [phase.bound for phase in found] == ["operations", "bytes", "links"]
    assert found[0].seconds == pytest.approx(1e15 / 798e12)
    assert found[1].seconds == pytest.approx(1e13 / 3.0e12)
    # A ring of 8: 2 * 7 / 8 of the bytes leave every GPU.
    assert found[2].seconds == pytest.approx(1.75e12 / 450e9, rel=1e-3)


def test_groups_across_nodes_use_the_network() -> None:
    gpu = roof()
    inside, across = (collective_seconds(work.Collective("all_reduce", n, 1e9, 0), gpu) for n in (8, 16))
    assert inside == pytest.approx(1.75e9 / 450e9)
    assert across == pytest.approx(1.875e9 / 50e9)
    # Two replicas of eight neighbouring shards each: their pairs are a node apart.
    strided = collective_seconds(work.Collective("all_reduce", 2, 1e9, 0, stride=8), gpu)
    assert strided == pytest.approx(1e9 / 50e9)


def test_a_server_judge_by_hand() -> None:
    """One copy on one GPU, one request at a time: each token reads all weights and the context's keys."""
    gpu, judge = roof(), load_judge("8b")
    load = workload_of(
        RunConfig.model_validate(
            {"batch_size": 1, "data": {"min_prefix_tokens": 100, "max_prefix_tokens": 100}}
        ),
        1,
    )
    phase = server_judge(Judging(1, 0.0, 10.0), load, 1, judge, 1, gpu, concurrency=1)
    context = 100 + 2 * 128
    assert phase.seconds == pytest.approx(10 * (2 * 8.03e9 + context * 131072) / 3.0e12)
    # Twice the GPUs and requests: half the time.
    twice = server_judge(Judging(2, 0.0, 20.0), load, 1, judge, 2, gpu, concurrency=2)
    assert twice.seconds == pytest.approx(phase.seconds)


@pytest.mark.parametrize("kind", ["all_pairs", "pivot", "tournament"])
@pytest.mark.parametrize("both", [False, True])
def test_comparisons_are_those_of_the_schedules(kind: Any, both: bool) -> None:
    for n in (2, 3, 8, 16, 17):
        judge = JudgeConfig(schedule=kind, both_orders=both)
        if kind == "tournament":
            assert num_comparisons(judge, n) == tournament_budget(n, judge.budget, both)
            continue
        asked = make_schedule(kind, n, [0], both_orders=both, pivot=0, share=0.25).propose([0.0] * n)
        assert num_comparisons(judge, n) == len(asked)


def test_what_does_not_fit_says_what_to_change(cfg: RunConfig) -> None:
    tight = cfg.model_copy(update={"parallel": ParallelConfig(micro_batch_tokens=65536)})
    plan = make_plan(tight, request_of(1))
    assert not plan.fits
    assert any("distributed_optimizer" in line for line in plan.advice)
    assert make_plan(cfg, request_of()).fits
    # The largest wave is the one that still fits, and one group more does not.
    many = cfg.model_copy(update={"batch_size": 4096})
    largest, n = make_plan(many, request_of(1)).largest_wave, 16
    for groups, fits in ((largest // n, True), (largest // n + 1, False)):
        size = -(-groups * (64 + 16 * 8) * 16 * 192 * 1024 // 2**20)
        asked = many.model_copy(update={"sampler": many.sampler.model_copy(update={"kv_memory_mb": size})})
        assert make_plan(asked, request_of(1)).fits is fits


def test_the_sweep_proposes_what_fits_best_first(cfg: RunConfig) -> None:
    proposals = sweep(cfg, request_of())
    seconds = [p.plan.seconds for p in proposals]
    assert all(p.plan.fits for p in proposals)
    assert seconds == sorted(seconds) or max(seconds) / min(seconds) < 1.001
    assert proposals[0].plan.seconds <= make_plan(cfg, request_of()).seconds
    assert proposals[0].reason.startswith("fastest") and all(p.reason for p in proposals)


def test_a_larger_model_is_split_over_more_gpus() -> None:
    large = RunConfig.model_validate(
        {
            "model": {
                "num_layers": 80, "hidden_size": 8192, "num_heads": 64, "num_kv_heads": 8, "ffn_size": 28672,
                "precision": "bf16",
            },
            "data": {"vocab_size": 128256},
        }
    )  # fmt: skip
    best = sweep(large, request_of(16))[0].plan
    assert best.layout["tensor"] * best.layout["pipeline"] >= 8
    with pytest.raises(DoesNotFitError, match="no layout of 8 x h100"):
        sweep(large, request_of(1))


def test_measurements_take_the_place_of_the_table(tmp_path: Path) -> None:
    csv = tmp_path / "rates.csv"
    csv.write_text(
        "date,machine,rate,value\n"
        "2026-01-01,NVIDIA H100 80GB HBM3,copy_tb_s,2.9\n"
        "2026-02-01,NVIDIA H100 80GB HBM3,copy_tb_s,2.8\n"
        "2026-02-01,NVIDIA H100 80GB HBM3,decode_attention,0.77\n"
        "2026-02-01,NVIDIA H200,wave_s,9\n"
    )
    found = load_hardware("h100", measured=csv)
    assert (found.gpu.copy_tb_s, found.shares.decode_attention) == (2.8, 0.77)
    assert found.overheads.wave_s != 9
    assert found.measured == ("copy_tb_s", "decode_attention")
    csv.write_text("date,machine,rate,value\n2026-01-01,NVIDIA H100,copy,2.9\n")
    with pytest.raises(DataError, match="no rate is called 'copy'"):
        load_hardware("h100", measured=csv)
    csv.write_text("date,machine,rate,value\n2026-01-01,NVIDIA H100,gemm,1.9\n")
    with pytest.raises(DataError, match="gemm"):
        load_hardware("h100", measured=csv)
    csv.write_text("date,machine,rate,value\n2026-01-01,NVIDIA H100,gemm,fast\n")
    with pytest.raises(DataError, match="line 2"):
        load_hardware("h100", measured=csv)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "0"], "--nodes 0: must be 1 or more"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0"),
        (["--gpu", "b9000"], "known: a100, h100, h200"),
        (["--price", "0"], "--price 0"),
        (["--judge", "9b"], "known: 32b, 70b, 8b"),
        (["--judge-gpus", "4"], "needs --judge"),
        (["--judge-gpus", "2", "--judge", "70b"], "one copy of that judge needs 4"),
        (["--vocab-size", "0"], "--vocab-size 0"),
        (["--prefix-tokens", "5"], "--prefix-tokens 5"),
        (["--parallel.tensor", "16", "--nodes", "3"], "multiple of 16"),
        (["--parallel.tensor", "3"], "does not divide"),
        (["--nodes", "40"], "batch_size=256 is below the 320"),
        (["--sampler.max_sequences", "16", "--sampler.kv_memory_mb", "10"], "not one group of 16"),
        (["--gpu", "a100", "--model.precision", "fp8"], "has no FP8"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], words: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(config), *options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_the_command(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    result = CliRunner().invoke(
        app, ["plan", str(config), "--nodes", "8", "--price", "2.5", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    assert "prediction" in result.output and "it fits" in result.output
    plan = json.loads(file.read_text())
    assert plan["prediction"] is True
    assert plan["step"]["dollars"] == pytest.approx(64 * plan["step"]["seconds"] / 3600 * 2.5)
    assert sum(p["seconds"] for p in plan["phases"]) == pytest.approx(plan["step"]["seconds"])
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "plan",
                str(config),
                "--nodes",
                "1",
                "--parallel.micro_batch_tokens",
                "131072",
                "--json",
                str(file),
            ]
        )
    assert stopped.value.code == 9
    assert "error:" in capsys.readouterr().err
    assert json.loads(file.read_text())["fits"] is False


def test_planning_needs_no_torch(config: Path) -> None:
    script = (
        "import sys; from sip_engine.cli import main; main(['plan', sys.argv[1], '--nodes', '8', '--sweep']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script, str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_plan_beside_standard_pretraining(cfg: RunConfig) -> None:
    plan = make_plan(cfg, request_of(price=2.0))
    assert plan.standard.seconds < plan.step.seconds
    assert plan.standard.peak_gib < plan.step.peak_gib
    with pytest.raises(ConfigError, match="--judge"):
        local = cfg.judge.model_copy(update={"backend": "local"})
        make_plan(cfg.model_copy(update={"judge": local}), request_of())
