"""The whole loop on the emulated device: the CPU's run, with checkpoints and a restart, and on two processes."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from emulated_cuda import emulated_cuda
from ranks import run_ranks
from test_loop import MODEL, metrics, run_config

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.sampler.sampler import Sampler
from sip_engine.train import train


def short_run(folder: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "steps": 2,
        "batch_size": 2,
        "model": MODEL | {"precision": "fp32"},
        "candidates": [{"original": True, "rewrite": True, "rollouts": 2}],
        "eval": {"every": 2, "num_prefixes": 2},
        "checkpoint": {"every": 1},
    }
    return run_config(folder, **settings | changes)


def assert_close(found: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    assert [row.keys() for row in found] == [row.keys() for row in want]
    for ours, theirs in zip(found, want, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=2e-5), name


def test_a_run_with_checkpoints_and_a_restart_is_the_cpus(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reference kernels: Triton's own are compared where they are quick to run. The pages of one run are
    sized by free memory, and gone while it updates.
    """
    train(short_run(tmp_path / "cpu"), mesh)
    monkeypatch.setenv("SIP_KERNELS", "reference")
    with emulated_cuda() as cuda:
        cuda.free_bytes, held = 32 * 2**20, []
        loop = import_module("sip_engine.train")
        update, propose = loop.update, Sampler.generate

        def updating(*args: Any) -> Any:
            held.append(("update", cuda.allocated_bytes))
            return update(*args)

        def sampling(*args: Any) -> Any:
            found = propose(*args)
            held.append(("sample", cuda.allocated_bytes))
            return found

        with monkeypatch.context() as patch:
            patch.setattr(loop, "update", updating)
            patch.setattr(Sampler, "generate", sampling)
            train(short_run(tmp_path / "cuda", sampler={"kv_memory_mb": "auto"}), start_mesh())
        pages = 0.75 * cuda.free_bytes
        assert {kind for kind, size in held if size > pages} == {"sample"}
        assert all(size > pages for kind, size in held if kind == "sample")
        assert [kind for kind, _ in held].count("update") == 2
        train(short_run(tmp_path / "again", steps=1), start_mesh())
        train(short_run(tmp_path / "again"), start_mesh())
        assert cuda.counts["launch"] > 10_000 and cuda.counts["triton"] == 0
    assert_close(metrics(tmp_path / "cuda"), metrics(tmp_path / "cpu"))
    assert metrics(tmp_path / "again")[-1] == pytest.approx(metrics(tmp_path / "cuda")[-1], rel=1e-6)


def train_on_ranks(folder: Path, parallel: str) -> None:
    with emulated_cuda():
        cfg = short_run(folder, parallel=json.loads(parallel))
        train(cfg, start_mesh(cfg.parallel.tensor, cfg.parallel.pipeline, seed=cfg.seed))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}], ids=["tensor", "pipeline"])
def test_two_processes_make_the_same_run(
    mesh: Mesh, tmp_path: Path, parallel: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(short_run(tmp_path / "cpu"), mesh)
    monkeypatch.setenv("SIP_KERNELS", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run_ranks("test_loop_on_cuda:train_on_ranks", 2, tmp_path / "cuda", json.dumps(parallel))
    assert_close(metrics(tmp_path / "cuda"), metrics(tmp_path / "cpu"))
