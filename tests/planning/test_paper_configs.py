"""The paper's and the scale configs: they parse, dry-run, fit, hold the paper's figures and stand in the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.plan_table import BEGIN, END, README, plan_config, planned_configs, row
from benchmarks.record import ROOT
from sip_engine.cli import app
from sip_engine.config.overrides import read_run_config

CONFIGS = planned_configs()


def test_all_runs_are_there() -> None:
    names = {path.stem for path in CONFIGS if path.parent.name == "paper"}
    assert names == {
        "quality", "factuality", "safety", "scratch", "scratch_original", "scratch_next_token", "judge", "rewriter",
    }  # fmt: skip
    assert len([path for path in CONFIGS if path.parent.name == "scale"]) == 4


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_config_resolves_fits_and_stands_in_the_table(path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(ROOT / path), "--dry-run"])
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)
    assert settings["out"] == f"runs/{path.parent.name}/{path.stem}"
    plan = plan_config(path)
    assert plan.fits, plan.advice
    predictions = README.read_text().split(BEGIN)[1].split(END)[0]
    assert row(path, plan) in predictions.splitlines(), (
        "python -m benchmarks plan_table writes the table anew"
    )


def test_the_papers_settings() -> None:
    continual = [
        read_run_config(ROOT / f"configs/paper/{n}.toml", []) for n in ("quality", "factuality", "safety")
    ]
    for cfg in continual:
        assert (cfg.steps, cfg.batch_size, cfg.candidates[0].rollouts, cfg.optimizer.lr) == (
            2000,
            256,
            16,
            5e-6,
        )
        assert (cfg.optimizer.warmup_steps, cfg.optimizer.min_lr_ratio, cfg.data.suffix_tokens) == (
            100,
            0.1,
            128,
        )
    assert [cfg.candidates[0].original for cfg in continual] == [False, False, True]
    scratch = read_run_config(ROOT / "configs/paper/scratch.toml", [])
    assert (scratch.steps, scratch.optimizer.lr, scratch.optimizer.warmup_steps) == (21000, 5e-4, 2000)
    assert scratch.init is None and scratch.objective.kind == "rf_nll"
    judge, rewriter = (read_run_config(ROOT / f"configs/paper/{n}.toml", []) for n in ("judge", "rewriter"))
    for cfg, prompt, reply in ((judge, 3584, 512), (rewriter, 3968, 128)):
        assert (cfg.data.max_prefix_tokens, cfg.data.suffix_tokens, cfg.objective.generations) == (
            prompt,
            reply,
            16,
        )
        assert (cfg.steps, cfg.optimizer.lr, cfg.optimizer.min_lr_ratio) == (500, 2e-7, 1.0)
        assert (cfg.sampler.temperature, cfg.sampler.top_p) == (0.6, 0.6)
