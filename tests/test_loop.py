"""The whole loop in a small world: the same run at every layout, after a restart, and from the command line."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from world_runs import MODEL, STEPS, metrics, pools, run_config

from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.train import train
from sip_engine.utils.errors import CheckpointError, ConfigError, ThresholdError
from sip_engine.utils.files import lock_folder, release_folder


def train_on_ranks(folder: Path, parallel: str) -> None:
    layout = json.loads(parallel)
    cfg = run_config(folder, parallel=layout)
    train(cfg, start_mesh(cfg.parallel.tensor, cfg.parallel.pipeline, seed=cfg.seed))


@pytest.fixture(scope="module")
def single(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    train(run_config(folder), mesh)
    return folder


def test_a_run_leaves_its_records(single: Path) -> None:
    rows = metrics(single)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/heldout_loss" in row] == [0, 2, 4]
    for row in training:
        assert row["drift/max"] < 1e-5
        shares = [row[f"chosen/{kind}"] for kind in ("original", "rewrite", "rollout")]
        assert sum(shares) == pytest.approx(1.0)
        assert row["reward/rewrite"] > row["reward/rollout"]
    recorded = pools(single)
    assert len(recorded) == STEPS * 4
    for pool in recorded:
        rewards = [c["reward"] for c in pool["candidates"]]
        if pool["chosen"] is not None:
            assert rewards[pool["chosen"]] == max(rewards) > min(rewards) == rewards[pool["rejected"]]
    assert {p.name for p in (single / "run" / "checkpoints").iterdir()} == {"step_00000002", "step_00000004"}


def test_the_same_run_again_records_the_same(mesh: Mesh, single: Path, tmp_path: Path) -> None:
    train(run_config(tmp_path), mesh)
    assert metrics(tmp_path) == metrics(single)
    assert pools(tmp_path) == pools(single)


def test_a_folder_has_one_writer(mesh: Mesh, tmp_path: Path) -> None:
    """A second run is refused while the first is at work, and leaves nothing of its own."""
    cfg = run_config(tmp_path, steps=1, checkpoint={"every": 0}, eval={"generate": False, "num_prefixes": 2})
    lock = lock_folder(cfg.out)
    assert lock is not None
    with pytest.raises(ConfigError, match="another run is at work there"):
        train(cfg, mesh)
    assert [p.name for p in cfg.out.iterdir()] == [".lock"]
    release_folder(cfg.out, lock)
    assert not cfg.out.exists()

    train(cfg, mesh)
    assert lock_folder(cfg.out) is not None, "a run that has ended holds nothing"


def test_held_out_prefixes_are_those_of_the_first_evaluation(mesh: Mesh, tmp_path: Path) -> None:
    """Evaluations compare with its continuations, prefix by prefix."""
    train(run_config(tmp_path, steps=2), mesh)
    cfg = run_config(tmp_path, eval={"every": 2, "num_prefixes": 5})
    with pytest.raises(
        ConfigError, match="its first evaluation was of 6 other held-out prefixes than these 5"
    ):
        train(cfg, mesh)


def test_bf16_parameters_train_resume_and_are_not_mixed_with_others(mesh: Mesh, tmp_path: Path) -> None:
    """Their optimizer keeps fp32 copies; sampler and trainer round differently, but alike on the whole."""
    bf16 = {"model": MODEL | {"precision": "bf16"}}
    train(run_config(tmp_path / "whole", **bf16), mesh)
    train(run_config(tmp_path, steps=2, **bf16), mesh)
    with pytest.raises(CheckpointError, match="parameters of bfloat16, here they are float32"):
        train(run_config(tmp_path, model=MODEL | {"precision": "fp32"}), mesh)
    train(run_config(tmp_path, **bf16), mesh)
    ends = [metrics(folder)[-1]["eval/heldout_loss"] for folder in (tmp_path, tmp_path / "whole")]
    assert ends[0] == pytest.approx(ends[1], abs=5e-3)
    assert all(row["drift/mean"] < 0.01 for row in metrics(tmp_path) if "drift/mean" in row)


@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    mesh: Mesh, single: Path, tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after `stop_at` updates; the newest checkpoint is from step 2, what came later is made again."""
    module = import_module("sip_engine.train")  # the package's own `train` is the function

    class Killed(Exception):
        pass

    calls = iter(range(STEPS))
    real = module.update

    def dying(*args: Any) -> Any:
        if next(calls) == stop_at:
            raise Killed
        return real(*args)

    monkeypatch.setattr(module, "update", dying)
    with pytest.raises(Killed):
        train(run_config(tmp_path), mesh)
    monkeypatch.undo()
    train(run_config(tmp_path), mesh)
    assert metrics(tmp_path) == metrics(single)
    assert pools(tmp_path) == pools(single)


def test_a_finished_run_trains_no_further(mesh: Mesh, single: Path) -> None:
    before = metrics(single)
    train(run_config(single), mesh)
    assert metrics(single) == before


def test_another_models_checkpoint_is_refused(mesh: Mesh, single: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hidden_size 32 != 64"):
        train(run_config(tmp_path, init=single / "run", model=MODEL | {"hidden_size": 64}), mesh)
    assert not (tmp_path / "run").exists()


def test_drift_beyond_its_limit_stops_the_run(mesh: Mesh, tmp_path: Path) -> None:
    with pytest.raises(ThresholdError, match=r"drift/mean is .* above max_drift=1e-12"):
        train(run_config(tmp_path, max_drift=1e-12), mesh)


def test_a_judge_that_fails_stops_the_run_and_says_why(
    mesh: Mesh, single: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Its context does not hold the longer prompts; and it is a policy."""
    local = {"checkpoint": str(single / "run")}
    judge = {"backend": "local", "local": local, "max_failure_rate": 0.0}
    with pytest.raises(
        ThresholdError, match=r"above judge.max_failure_rate=0.0 \(quality: the prompt is longer"
    ):
        train(run_config(tmp_path, judge=judge), mesh)
    assert 'was trained with task = "policy", not as a judge' in capfd.readouterr().err


OBJECTIVES = [
    ("rf_nll", {}),
    ("next_token", {}),
    ("sft_rewrite", {}),
    ("sft_rollout", {}),
    ("dpo_rewrite_over_rollout", {}),
    ("dpo", {"length_normalised": True, "nll_weight": 0.5, "document_nll_weight": 0.5}),
]


@pytest.mark.parametrize(("kind", "settings"), OBJECTIVES, ids=[kind for kind, _ in OBJECTIVES])
def test_every_objective_trains_on_what_it_says(
    mesh: Mesh, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    cfg = run_config(tmp_path, steps=2, objective={"kind": kind, **settings}, eval={"generate": False})
    train(cfg, mesh)
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert all(("document/nll" in row) == ("document_nll_weight" in settings) for row in rows)
    for pool in pools(tmp_path):
        kinds = [c["kind"] for c in pool["candidates"]]
        if kind in ("sft_rewrite", "dpo_rewrite_over_rollout"):
            assert kinds[pool["chosen"]] == "rewrite"
        if kind == "sft_rollout":
            assert kinds[pool["chosen"]] == "rollout"
        if kind == "dpo_rewrite_over_rollout":
            assert kinds[pool["rejected"]] == "rollout"
    assert bool(pools(tmp_path)) == (kind != "next_token")


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel", [{"tensor": 2}, {"tensor": 1}, {"tensor": 1, "distributed_optimizer": True}]
)
def test_two_processes_train_the_same_policy(single: Path, tmp_path: Path, parallel: dict[str, Any]) -> None:
    """TP 2 and DP 2: candidates, verdicts, choices and losses are those of one process."""
    run_ranks("test_loop:train_on_ranks", 2, tmp_path, json.dumps(parallel))
    got, want = metrics(tmp_path), metrics(single)
    assert [row.keys() for row in got] == [row.keys() for row in want]
    for ours, theirs in zip(got, want, strict=True):
        for name, value in theirs.items():
            if not name.startswith("drift"):  # rounding only, so it is another one here
                assert ours[name] == pytest.approx(value, abs=2e-4), f"{name} at step {theirs['step']}"
    recorded, wanted = pools(tmp_path), pools(single)  # of both processes, in the order of the batch
    for pool, other in zip(recorded, wanted, strict=True):
        assert (pool["step"], pool["document"], pool["cut"]) == (
            other["step"],
            other["document"],
            other["cut"],
        )
        assert (pool["chosen"], pool["rejected"]) == (other["chosen"], other["rejected"])
        assert [c["text"] for c in pool["candidates"]] == [c["text"] for c in other["candidates"]]


def test_a_failure_signature_is_said_or_stops_the_run(
    mesh: Mesh, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """A limit that any drift exceeds: seen at the first look, in the metrics, and at choice the end of the run."""
    easy = {"every": 2, "drift": 0.0}
    train(run_config(tmp_path, monitors=easy), mesh)
    looks = [row for row in metrics(tmp_path) if "monitor/drift" in row]
    assert [(row["step"], row["monitor/drift"]) for row in looks] == [(2, 1.0), (4, 1.0)]
    assert capfd.readouterr().err.count("watch out: drift") == 1
    calm = tmp_path / "calm"
    train(run_config(calm, monitors={"every": 2}), mesh)
    assert all(row.get("monitor/drift", 0.0) == 0.0 for row in metrics(calm))
    stops = tmp_path / "stops"
    with pytest.raises(ThresholdError, match=r"step 2: drift .* the newest checkpoint is from before"):
        train(run_config(stops, monitors={**easy, "action": "stop"}), mesh)
    assert max(row["step"] for row in metrics(stops)) == 2
