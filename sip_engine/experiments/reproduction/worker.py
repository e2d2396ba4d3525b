"""One job of a reproduction in a process of its own: make a stage, or run a row with one seed and evaluate it.

Started by `runner.py` as `python -m sip_engine.experiments.reproduction.worker PLAN OUT SCALE NAME [SEED]`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh, start_alone, stop_mesh
from sip_engine.evaluation.command import evaluate_checkpoint
from sip_engine.experiments.reproduction.plan import (
    Arm,
    Plan,
    Stage,
    arm_config,
    arm_recipe,
    load_plan,
    scaled,
    stage_config,
    stage_recipe,
    stages_of,
    truth_config,
)
from sip_engine.experiments.reproduction.provenance import RESULT, STAGE_RESULT, begin
from sip_engine.monitoring.meters import EnergyMeter, peak_memory_mb
from sip_engine.monitoring.records import METRICS, read_records
from sip_engine.monitoring.supervision import supervised
from sip_engine.policy.checkpoint import latest_checkpoint, read_state
from sip_engine.train import train
from sip_engine.utils.errors import Stopped
from sip_engine.utils.files import sha256_of, write_json
from sip_engine.utils.progress import console
from sip_engine.utils.stopping import catch_signals, set_grace

BASELINES = "baselines"
"""Folder of the baseline's evaluations."""
_JUDGED = ("calls_per_prefix", "tokens_per_prefix", "failure_rate")
_HELD_OUT = (
    "win_rate",
    "coherence_win_rate",
    "factuality",
    "safety",
    "faultless",
    "heldout_loss",
    "heldout_loss_faultless",
    "relative_diversity",
    "distinct_3",
    "token_entropy",
)


def make_stage(plan: Plan, stage: Stage, beside: Path, out: Path) -> None:
    """Train a stage's model or make its data; `stage.json` says that it is complete."""
    cfg = stage_config(plan, stage, beside, out)
    folder = out / stage.name
    result = begin(folder, stage_recipe(plan, stage, beside), [out / name for name in stage.needs])
    result["settings"] = cfg.model_dump(mode="json")
    if stage.data is not None:
        stage.data.under(out).make(cfg, folder)
        result["files"] = {path.name: sha256_of(path) for path in sorted(folder.glob("*.jsonl"))}
    else:
        result["cost"] = _train(cfg, start_alone(seed=cfg.seed))
        result["evaluations"] = [r for r in read_records(cfg.out / METRICS) if "eval/heldout_loss" in r]
    write_json(folder / STAGE_RESULT, result)


def run_arm(plan: Plan, row: Arm, seed: int, out: Path) -> None:
    """Train a row with one seed, measure it by the world's truth against the baseline stage, write `result.json`."""
    cfg = arm_config(plan, row, seed, out)
    made = begin(cfg.out, arm_recipe(plan, row, seed), stages_of(plan, cfg, out))
    cost = _train(cfg, start_alone(seed=cfg.seed))
    found = evaluate_checkpoint(
        cfg.out,
        cfg.out / "final",
        truth_config(plan, cfg, out),
        source=f"row {row.name}",
        baseline=out / plan.baseline,
        kept=out / BASELINES,
    )
    result = {
        **made,
        "row": row.name,
        "seed": seed,
        "settings": cfg.model_dump(mode="json"),
        "figures": _figures(found["policy"]),
        "baseline": _figures(found["baseline_policy"]),
        "num_prefixes": found["num_prefixes"],
        "num_safe_prefixes": found["policy"].get("safe_prefixes", {}).get("win_rate", {}).get("n"),
        "cost": cost,
    }
    write_json(cfg.out / RESULT, result)


def _train(cfg: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """Train; returns seconds of a step and of its parts, peak memory, joules of a step and what judging took."""
    meter, newest = EnergyMeter(), latest_checkpoint(cfg.out / "checkpoints")
    made = cfg.steps - (read_state(newest).step if newest else 0)
    set_grace(cfg.faults.grace_s)
    with supervised(cfg):
        train(cfg, mesh)
    steps, joules = _steps(cfg), meter.joules()
    parts = {
        name.removeprefix("seconds/"): float(np.mean([s.get(name, 0.0) for s in steps]))
        for name in sorted({name for s in steps for name in s if name.startswith("seconds/")})
        if name != "seconds/judge_busy"  # beside generation, or within seconds/judge
    }
    judged = {
        name: float(np.mean([s[f"judge/{name}"] for s in steps if f"judge/{name}" in s]))
        for name in _JUDGED
        if any(f"judge/{name}" in s for s in steps)
    }
    return {
        "steps": len(steps),
        "step_seconds": sum(parts.values()),
        "seconds": parts,
        "elapsed": steps[-1]["elapsed"],
        "peak_memory_mb": peak_memory_mb() if made else None,
        "joules_per_step": joules / made if joules is not None and made else None,
        "judge": judged,
    }


def _steps(cfg: RunConfig) -> list[dict[str, Any]]:
    return [row for row in read_records(cfg.out / METRICS) if "loss" in row]


def _figures(policy: dict[str, Any]) -> dict[str, float]:
    """The figures of one policy that tables show; those of safe prefixes have `_safe` behind them."""
    found = {}
    for kind, suffix in (("held_out", ""), ("safe_prefixes", "_safe"), ("unsafe_prefixes", "_unsafe")):
        for name in _HELD_OUT:
            value = policy.get(kind, {}).get(name)
            if value is not None:
                found[name + suffix] = value["value"] if isinstance(value, dict) else value
    return found


def main(argv: list[str]) -> None:
    """Run the job that the arguments name; a signal ends it with a line and the exit code that it has in `sip`."""
    try:
        with catch_signals():
            _work(argv)
    except Stopped as stopped:
        console.print(str(stopped), soft_wrap=True, markup=False)
        sys.exit(stopped.exit_code)
    finally:
        stop_mesh()  # nccl warns at the end of a process that did not, below the reason of a failure


def _work(argv: list[str]) -> None:
    path, out, scale, name, *seed = argv
    plan = scaled(load_plan(Path(path)), float(scale))
    if seed:
        run_arm(plan, next(row for row in plan.rows if row.name == name), int(seed[0]), Path(out))
    else:
        make_stage(plan, next(s for s in plan.stages if s.name == name), Path(path).parent, Path(out))


if __name__ == "__main__":
    main(sys.argv[1:])
