"""`sip reproduce` on a tiny plan: stages and rows in processes of their own, resumed, refused, failed and shown."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from sip_engine.experiments.reproduction.plan import load_plan
from sip_engine.experiments.reproduction.runner import Job, RowsFailedError, _alone, _Processes, reproduce
from sip_engine.experiments.reproduction.worker import run_arm
from sip_engine.utils.errors import ConfigError, DataError

RUN = """
steps = 2
batch_size = 4
[world]
num_people = 12
train_documents = 60
test_documents = 30
[model]
num_layers = 2
hidden_size = 32
num_heads = 2
num_kv_heads = 1
ffn_size = 64
max_context = 96
[data]
vocab_size = 500
suffix_tokens = 12
max_prefix_tokens = 40
min_prefix_tokens = 8
cache = "made/cache"
[judge]
backend = "world"
[optimizer]
lr = 1e-3
warmup_steps = 1
[checkpoint]
every = 0
[eval]
every = 0
num_prefixes = 8
generate = false
"""
PLAN = """
root = "made"
seeds = [1, 2]
baseline = "base"
[[stages]]
name = "base"
config = "base.toml"
[[stages]]
name = "elsewhere"
config = "base.toml"
needs = ["base"]
set.init = "made/base"
judge_shifts = { judge = "base", method = "log_odds", pairs = 6 }
[evaluation.eval]
num_prefixes = 10
[[tables]]
name = "main"
title = "Main results"
figures = ["win_rate"]
[[rows]]
name = "next_token"
label = "next-token prediction"
table = "main"
paper = { win_rate = 49.0 }
set = { objective = { kind = "next_token" } }
[[rows]]
name = "dpo"
label = "two rollouts"
table = "main"
paper = { win_rate = 69.9 }
set = { candidates = [{ original = false, rollouts = 2 }] }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan with its base's config, and everything made of it."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "base.toml").write_text(f'out = "made/base"\n{RUN}\n[objective]\nkind = "next_token"\n')
    common = "\n".join(
        f"[common.{line[1:]}" if line.startswith("[") else line for line in RUN.splitlines()
    ).replace("\nsteps", '\n[common]\ninit = "made/base"\nsteps')
    (folder / "plan.toml").write_text(PLAN.replace("[[rows]]", common + "\n[[rows]]", 1))
    reproduce(folder / "plan.toml", folder / "out", jobs=2)
    return folder


@pytest.mark.slow
def test_a_judge_is_asked_about_what_it_was_not_trained_on(folder: Path) -> None:
    found = json.loads((folder / "out" / "elsewhere" / "shifts.json").read_text())
    assert len({row["name"] for row in found["rows"]}) == 14
    assert all(
        row["asked"] == 0 or 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in found["rows"]
    )
    page = (folder / "out" / "plan.html").read_text()
    assert "The judge on what it was not trained on" in page and "a myth in one sentence only" in page


@pytest.mark.slow
def test_every_row_and_seed_is_measured_against_the_base(folder: Path) -> None:
    found = {
        (row, seed): json.loads((folder / "out" / "rows" / row / f"seed_{seed}" / "result.json").read_text())
        for row in ("next_token", "dpo")
        for seed in (1, 2)
    }
    for (row, seed), result in found.items():
        assert (result["row"], result["seed"], result["num_prefixes"]) == (row, seed, 10)
        assert 0 <= result["figures"]["win_rate"] <= 1 and "win_rate" not in result["baseline"]
        cost = result["cost"]
        assert cost["steps"] == 2 and cost["peak_memory_mb"] > 100
        assert cost["step_seconds"] == pytest.approx(sum(cost["seconds"].values()), rel=0.2)
        lines = (folder / "out" / "rows" / row / f"seed_{seed}" / "final" / "continuations.jsonl").read_text()
        wins = [json.loads(line)["win_rate"] for line in lines.splitlines()]
        assert result["figures"]["win_rate"] == pytest.approx(sum(wins) / len(wins))
    assert found["dpo", 1]["cost"]["judge"]["calls_per_prefix"] == 1 + 2 + 2
    assert found["dpo", 1]["baseline"] == found["next_token", 2]["baseline"]
    page = (folder / "out" / "plan.html").read_text()
    assert "two rollouts" in page and "69.9" in page


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_other_settings_are_refused(folder: Path) -> None:
    made = [*sorted((folder / "out").rglob("result.json")), folder / "out" / "base" / "stage.json"]
    before = [path.stat().st_mtime_ns for path in made]
    reproduce(folder / "plan.toml", folder / "out", jobs=2)
    assert [path.stat().st_mtime_ns for path in made] == before
    other = folder / "other.toml"
    other.write_text((folder / "plan.toml").read_text().replace("rollouts = 2", "rollouts = 3"))
    with pytest.raises(ConfigError, match=r"made with other settings .*'rollouts': 3"):
        reproduce(other, folder / "out")
    moved = folder / "moved"
    (folder / "out").rename(moved)  # what is done stays done wherever it lies
    reproduce(folder / "plan.toml", moved)
    moved.rename(folder / "out")
    with pytest.raises(ConfigError, match="no such row"):
        reproduce(folder / "plan.toml", folder / "out", rows=["dppo"])


@pytest.mark.slow
def test_what_was_begun_otherwise_or_made_from_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    run = out / "rows" / "dpo" / "seed_1"
    (run / "result.json").rename(run / "kept.json")
    other = folder / "other.toml"
    other.write_text((folder / "plan.toml").read_text().replace("rollouts = 2", "rollouts = 3"))
    with pytest.raises(ConfigError, match=r"dpo/seed_1 was begun with other settings .*'rollouts': 3"):
        reproduce(other, out, rows=["dpo"], seeds=[1])
    (run / "kept.json").rename(run / "result.json")
    shutil.rmtree(out / "elsewhere")  # it, too, is made from the base, and would be named first
    stage = out / "base" / "stage.json"
    stage.write_text(stage.read_text().replace('"elapsed": ', '"elapsed": 1'))
    with pytest.raises(ConfigError, match="seed_1 was made from another base: remove it"):
        reproduce(folder / "plan.toml", out, rows=["dpo"], seeds=[1])
    (run / "result.json").rename(run / "kept.json")
    with pytest.raises(ConfigError, match="seed_1 was begun from another base: remove it"):
        reproduce(folder / "plan.toml", out, rows=["dpo"], seeds=[1])
    plan = load_plan(folder / "plan.toml")
    with pytest.raises(
        ConfigError, match="begun from another base"
    ):  # where the base is made anew by the same call
        run_arm(plan, next(row for row in plan.rows if row.name == "dpo"), 1, out)
    (run / "kept.json").rename(run / "result.json")
    shutil.rmtree(out / "base")
    with pytest.raises(ConfigError, match="seed_1 was made from base, which is gone: remove it"):
        reproduce(folder / "plan.toml", out, rows=["dpo"], seeds=[1])
    assert not (out / "base").exists()
    (run / "result.json").write_text("{}")
    with pytest.raises(DataError, match="holds no record of `sip reproduce`"):
        reproduce(folder / "plan.toml", out, rows=["dpo"], seeds=[1])


@pytest.mark.slow
def test_the_page_shows_no_results_of_other_settings(folder: Path, tmp_path: Path) -> None:
    """Only the chosen rows are made anew; those that the plan has changed meanwhile are told and left out."""
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    other = folder / "other.toml"
    other.write_text((folder / "plan.toml").read_text().replace("rollouts = 2", "rollouts = 3"))
    text = reproduce(other, out, rows=["next_token"]).read_text()
    assert "seed 1 not shown, since it was made with other settings" in text
    assert "seed 2 not shown, since it was made with other settings" in text


@pytest.mark.slow
def test_a_row_that_fails_is_told_and_the_others_are_done(folder: Path) -> None:
    bad = folder / "bad.toml"
    text = (folder / "plan.toml").read_text().replace('name = "dpo"', 'name = "lost"')
    bad.write_text(text.replace("rollouts = 2 }] }", 'rollouts = 2 }], init = "made/nowhere" }'))
    with pytest.raises(RowsFailedError, match=r"1 of 4 jobs failed, first lost, seed 1: .*nowhere"):
        reproduce(bad, folder / "out", seeds=[1], jobs=1)
    assert not (folder / "out" / "rows" / "lost" / "seed_1" / "result.json").exists()
    assert "nowhere" in (folder / "out" / "bad.html").read_text()


def test_a_job_that_outlives_the_command_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after SIGKILL: the command's own file is closed, the job's process still holds the lock."""
    pipe, program = tmp_path / "pipe", tmp_path / "program"
    os.mkfifo(pipe)
    program.write_text(f"#!/bin/sh\nread line < {pipe}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    job = Job("a job", (), tmp_path / "job", tmp_path / "job" / "result.json", {})
    with _alone(tmp_path) as lock:
        thread = threading.Thread(target=_Processes(1, lock).run, args=(job,))
        thread.start()
        end = pipe.open("w")  # opens once the job reads
    with pytest.raises(ConfigError, match="a job that it left"), _alone(tmp_path):
        pass
    end.close()
    thread.join()
    with _alone(tmp_path):
        pass
