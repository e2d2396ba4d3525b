"""`sip reproduce` on a tiny plan: stages and rows in processes of their own, resumed, refused, failed and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sip_engine.errors import ConfigError
from sip_engine.reproduction.command import RowsFailedError, reproduce

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
    page = (folder / "out" / "reproduction.html").read_text()
    assert "two rollouts" in page and "69.9" in page


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_other_settings_are_refused(folder: Path) -> None:
    made = [*sorted((folder / "out").rglob("result.json")), folder / "out" / "base" / "stage.json"]
    before = [path.stat().st_mtime_ns for path in made]
    reproduce(folder / "plan.toml", folder / "out", jobs=2)
    assert [path.stat().st_mtime_ns for path in made] == before
    other = folder / "other.toml"
    other.write_text((folder / "plan.toml").read_text().replace("rollouts = 2", "rollouts = 3"))
    with pytest.raises(ConfigError, match=r"made with other settings .*rollouts 2 -> 3"):
        reproduce(other, folder / "out")
    with pytest.raises(ConfigError, match="no such row"):
        reproduce(folder / "plan.toml", folder / "out", rows=["dppo"])


@pytest.mark.slow
def test_a_row_that_fails_is_told_and_the_others_are_done(folder: Path) -> None:
    bad = folder / "bad.toml"
    text = (folder / "plan.toml").read_text().replace('name = "dpo"', 'name = "drifts"')
    bad.write_text(text.replace("rollouts = 2 }] }", "rollouts = 2 }], max_drift = 1e-30 }"))
    with pytest.raises(RowsFailedError, match=r"1 of 3 jobs failed, first drifts, seed 1: .*max_drift"):
        reproduce(bad, folder / "out", seeds=[1], jobs=1)
    assert not (folder / "out" / "rows" / "drifts" / "seed_1" / "result.json").exists()
    assert "max_drift" in (folder / "out" / "reproduction.html").read_text()
