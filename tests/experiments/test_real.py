"""`sip real`: measures and figures held to hand-made cases, and one tiny run from end to end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_runs import by_letters, make_small_checkpoint, use_tiny_configs, write_real_text

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.intervals import Estimate
from sip_engine.experiments.real import exam, job, judge, plan, runner
from sip_engine.experiments.real.measures import (
    HIGHER_IS_BETTER,
    Measured,
    repeated_trigrams,
    sentence_embedder,
)
from sip_engine.experiments.real.plan import ARMS, EXPERIMENTS, Plan, form_of
from sip_engine.experiments.real.results import figures_of, read_measured, save_measured, target_of
from sip_engine.train import train
from sip_engine.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Path:
    return make_small_checkpoint(tmp_path_factory.mktemp("real"), mesh)


@pytest.fixture
def tiny_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_configs(tmp_path / "configs", monkeypatch)


# --- measures and figures


def test_repeated_trigrams() -> None:
    assert repeated_trigrams("a b c d") == (0.0, 2.0)
    assert repeated_trigrams("A b c a b C a") == (2.0, 5.0)  # abc bca cab abc bca
    assert repeated_trigrams("a b") == (0.0, 0.0)


def test_embeddings_are_the_mean_over_tokens_at_length_one(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "some", "words", "here"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    model = BertModel(BertConfig(vocab_size=len(words), **sizes)).eval()
    model.save_pretrained(tmp_path)
    given = ["some words here", "here", ""]
    found = sentence_embedder(tmp_path)(given)
    for row, ids in zip(found, ([2, 5, 6, 7, 3], [2, 7, 3], [2, 3]), strict=True):
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].double().mean(dim=0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), atol=1e-6)


def _measured(wins: Sequence[float], loss: float, distinct: float = 0.5, repeated: float = 0.1) -> Measured:
    n = len(wins)
    ones = np.ones(n)
    table = {
        "win_rate": np.stack([np.array(wins) * 2, 2 * ones], axis=1),
        "heldout_loss": np.stack([loss * 10 * np.arange(1, n + 1), 10.0 * np.arange(1, n + 1)], axis=1),
        "repetition": np.stack([repeated * 20 * ones, 20 * ones], axis=1),
    }
    return Measured([str(k) for k in range(n)], table, distinct)


def test_figures_are_means_over_seeds_with_the_difference_to_next_token_training() -> None:
    base = _measured([0.5] * 8, 3.0)
    standard = [_measured([1, 1, 0, 0, 0, 0, 0, 0], 2.9), _measured([1, 1, 1, 1, 0, 0, 0, 0], 2.7)]
    improved = [_measured([1] * 8, 2.95, 0.3, 0.05), _measured([1] * 6 + [0] * 2, 2.95, 0.4, 0.05)]
    figures = {f.name: f for f in figures_of(base, {"standard": standard, "self_improving": improved})}
    assert list(figures) == [name for name in HIGHER_IS_BETTER if name in figures]

    wins = figures["win_rate"]
    values = {arm: one.value for arm, one in wins.arms.items() if isinstance(one, Estimate)}
    assert values == {"base": 0.5, "standard": 0.375, "self_improving": 0.875}
    assert wins.by_seed == {"standard": [0.25, 0.5], "self_improving": [1.0, 0.75]}
    assert isinstance(wins.gain, Estimate) and wins.gain.value == 0.5
    assert wins.verdict == "better"

    loss = figures["heldout_loss"]  # lower is better: 2.95 against the mean of 2.9 and 2.7
    assert isinstance(loss.gain, Estimate) and loss.gain.value == pytest.approx(0.15)
    assert loss.verdict == "worse"
    assert figures["repetition"].verdict == "better"
    assert figures["distinct_3"].gain == pytest.approx(-0.15)
    assert figures["distinct_3"].verdict == "worse"
    target = target_of(list(figures.values()))
    assert target["win_rate"] == 0.875 and not target["met"]
    assert target["worse_than_standard"] == ["distinct_3", "heldout_loss"]


def test_a_difference_that_may_be_none_is_no_worse() -> None:
    base = _measured([0.5] * 8, 3.0)
    arms = {
        "standard": [_measured([1, 0, 1, 0, 1, 0, 1, 0], 3.0)],
        "self_improving": [_measured([0, 1, 0, 1, 1, 0, 1, 1], 3.0)],
    }
    figures = figures_of(base, arms)
    assert {f.verdict for f in figures} == {"no worse"}
    assert not target_of(figures)["met"], "62.5 % are below the target"
    arms["self_improving"] = [_measured([1, 1, 1, 1, 1, 0, 1, 1], 3.0)]
    assert target_of(figures_of(base, arms))["met"]


def test_measurements_come_back_from_their_file(tmp_path: Path) -> None:
    one = _measured([1.0, 0.0], 2.5)
    save_measured(tmp_path / "m.json", one)
    found = read_measured(tmp_path / "m.json")
    assert found.continuations == one.continuations and found.distinct_3 == one.distinct_3
    for name, rows in one.table.items():
        np.testing.assert_array_equal(found.table[name], rows)
    (tmp_path / "m.json").write_text('{"table": {"win_rate": "x"}}')
    with pytest.raises(DataError, match="remove it"):
        read_measured(tmp_path / "m.json")


# --- plan


def test_forms() -> None:
    assert form_of(10) == plan.Form(10, (1,), 1.0, 32)
    hour = form_of(60, 0)
    assert (hour.seeds, hour.scale, hour.num_prefixes) == ((1, 2, 3), 2.0, 64)
    judged = form_of(60)
    assert (judged.minutes, judged.judge_minutes) == (54, 6)
    assert (judged.scale, judged.judge_scale) == pytest.approx((1.8, 0.6))
    assert form_of(20, 5) == plan.Form(15, (1,), 1.5, 48, 5)
    for of_the_judge in (-1, 9.5, float("nan")):
        with pytest.raises(ConfigError, match="--judge-minutes"):
            form_of(10, of_the_judge)
    for minutes in (0, -5, 601, float("nan")):
        with pytest.raises(ConfigError, match="--minutes"):
            form_of(minutes)


def test_both_arms_see_the_same_documents_and_the_judge_is_never_trained_on_what_it_measures(
    tmp_path: Path, small_checkpoint: Path
) -> None:
    made = Plan(tmp_path, form_of(60), small_checkpoint, None)
    for experiment in EXPERIMENTS:
        for seed in (1, 2, 3):
            standard, ours = (made.config(experiment, arm, seed) for arm in ARMS)
            for section in ("data", "seed", "steps", "batch_size", "init", "optimizer", "model"):
                assert getattr(standard, section) == getattr(ours, section)
            assert standard.objective.kind == "next_token" and ours.objective.kind == "dpo"
            weights = ours.judge.weights
            assert (weights.quality, weights.safety, weights.factuality) == (1.0, 0.0, 0.0)
    assert len({made.folder(*run) for run in made.runs()}) == 12


# --- the judge that is trained


def test_the_judges_figures_are_those_of_its_answers(
    tmp_path: Path, small_checkpoint: Path, tiny_configs: None
) -> None:
    del tiny_configs
    made = Plan(tmp_path, form_of(20, 10), small_checkpoint, None)
    nobody: Any = None  # nothing is computed
    training = judge.JudgeTraining(made, nobody)
    titles = ["judge: as it comes", "judge: warm start", "judge: GRPO"]
    assert [one.title for one in training.jobs(1.0)] == titles
    without = Plan(tmp_path, form_of(20, 0), small_checkpoint, None)
    assert not list(judge.JudgeTraining(without, nobody).jobs(1.0))

    def answered(stage: str, right: Sequence[float], replied: Sequence[float]) -> None:
        found = {
            exam.LOG_ODDS: {exam.HELD_OUT: np.array([[n, 2.0] for n in right])},
            exam.REPLIES: {exam.HELD_OUT: np.array([[n, 2.0] for n in replied])},
        }
        if stage == judge.BEFORE:
            found[exam.INFORMATION] = {exam.HELD_OUT: np.array([[2.0, 2.0]] * 3 + [[0.0, 2.0]])}
        exam.save_answers(made.judge / f"{stage}.json", found)

    assert training.figures() is None
    answered(judge.BEFORE, [1, 1, 1, 1], [0, 0, 0, 0])
    assert training.figures() is None, "nothing to compare"
    answered(judge.WARM, [2, 1, 1, 1], [2, 1, 1, 0])
    answered(judge.GRPO, [2, 2, 2, 1], [2, 2, 2, 1])
    figures = training.figures()
    assert figures is not None
    found = {who: one.value for who, one in figures.sets[exam.HELD_OUT].items()}
    assert found == {"mutual_information": 0.75, "before": 0.5, "warm": 0.625, "grpo": 0.875}
    assert figures.gains[exam.HELD_OUT].value == 0.375
    assert {stage: one.value for stage, one in figures.replies.items()} == {
        "before": 0,
        "warm": 0.5,
        "grpo": 0.875,
    }
    assert set(figures.prompts) == {"warm", "grpo"}


# --- the whole


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end_and_again(
    tmp_path: Path, small_checkpoint: Path, tiny_configs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del tiny_configs
    text = tmp_path / "text.jsonl"
    write_real_text(text, 200)
    out = tmp_path / "out"
    trained: list[Path] = []

    def train_or_stop(cfg: RunConfig, mesh: Mesh) -> Path:
        trained.append(cfg.out)
        if cfg.out.name == "scratch_standard_1" and trained.count(cfg.out) == 1:
            raise KeyboardInterrupt
        return train(cfg, mesh)

    monkeypatch.setattr(job, "train", train_or_stop)
    with pytest.raises(KeyboardInterrupt):
        runner.run_real(out, 1, text=text, model=small_checkpoint, embed=by_letters)
    early = json.loads((out / "summary.json").read_text())
    assert list(early["experiments"]) == ["continued"] and early["jobs_left"] == 2
    html = (out / "real.html").read_text()
    assert "2 of its trainings" in html and "A small policy from scratch" not in html

    # The same command goes on; a judge joins.
    page = runner.run_real(out, 2, judge_minutes=1, text=text, model=small_checkpoint, embed=by_letters)

    summary = json.loads((out / "summary.json").read_text())
    assert summary["experiments"]["continued"] == early["experiments"]["continued"]
    for experiment in EXPERIMENTS:
        figures = summary["experiments"][experiment.name]["figures"]
        assert set(figures) == set(HIGHER_IS_BETTER)
        assert figures["win_rate"]["base"]["value"] == 0.5, "against itself"
        standard, ours = (figures["heldout_loss"][arm]["value"] for arm in ARMS)
        gain = figures["heldout_loss"]["self_improving_less_standard"]["value"]
        assert gain == pytest.approx(ours - standard)
    html = page.read_text()
    assert "A small policy from scratch" in html and "true suffix" in html
    first = read_measured(out / "continued_self_improving_1" / "measured.json").continuations[0]
    assert len(first) > 5 and first.split()[0] in html
    assert len(trained) == 8
    accuracy = summary["judge"]["accuracy"]
    assert set(accuracy) == set(exam.SETS)
    for found in accuracy.values():
        assert set(found) == {"mutual_information", *judge.STAGES}
        assert all(0 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in found.values())
    assert "A judge trained here" in html and "twice the length" in html
    assert not (out / "judge" / "warm" / "checkpoints").exists()

    # One measurement is lost, all else is there: nothing is trained again, and the same comes out.
    (out / "scratch_standard_1" / "measured.json").unlink()
    runner.run_real(out, 2, text=text, model=small_checkpoint, embed=by_letters)
    again = json.loads((out / "summary.json").read_text())
    assert len(trained) == 8
    assert again["experiments"] == summary["experiments"] and again["judge"] == summary["judge"]
    assert again["wall_seconds"] > summary["wall_seconds"] and again["jobs_left"] == 0
    with pytest.raises(ConfigError, match=r"begun with --minutes 2\b"):
        runner.run_real(out, 3, text=text, model=small_checkpoint, embed=by_letters)
