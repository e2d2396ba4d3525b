"""`sip eval`: its figures are those of training, of the judge and of transformers; bad input is one line."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Sip, fails, read_jsonl, write_jsonl, write_texts
from eval_rows import MC, QA, RTP
from llama import llama_logprobs, llama_of
from ranks import run_ranks
from rich.console import Console
from world_runs import metrics, run_config

from sip_engine.config.parse import parse_config
from sip_engine.data.corpus import open_corpus
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.evaluation import command
from sip_engine.evaluation.command import evaluate_checkpoint, recorded_settings
from sip_engine.evaluation.results import comparison_table
from sip_engine.judges.heuristic.judge import HeuristicJudge
from sip_engine.judges.open import open_judge
from sip_engine.policy.checkpoint import resolve_checkpoint
from sip_engine.sampler.files import load_policy
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.train import train
from sip_engine.types import FactualityQuestion, Failure, PairQuestion, SafetyQuestion, Score
from sip_engine.utils.errors import DataError
from sip_engine.world import World, WorldJudge, measure


@pytest.fixture(scope="module")
def runs(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/run, trained on next tokens, and better/run, which goes on from it and ends with an evaluation."""
    folder = tmp_path_factory.mktemp("eval")
    cache = {**run_config(folder).data.model_dump(), "cache": folder / "cache"}
    first = {"objective": {"kind": "next_token"}, "eval": {"generate": False}, "data": cache}
    train(
        run_config(
            folder / "base", steps=12, batch_size=16, optimizer={"lr": 3e-3, "warmup_steps": 2}, **first
        ),
        mesh,
    )
    # So little training leaves the world's judge nothing to praise; the heuristic one sees differences.
    go_on = {"init": folder / "base" / "run", "data": cache, "eval": {"every": 0, "num_prefixes": 12}}
    go_on |= {"judge": {"backend": "heuristic"}}
    train(run_config(folder / "better", steps=6, optimizer={"lr": 3e-3, "warmup_steps": 1}, **go_on), mesh)
    return folder


def evaluated(runs: Path, out: Path, **options: Any) -> dict[str, Any]:
    settings, _ = recorded_settings(runs / "better" / "run")
    options = {"baseline": runs / "base" / "run", **options}
    evaluate_checkpoint(runs / "better" / "run", out, settings, **options)
    return json.loads((out / "eval.json").read_text())


@pytest.fixture(scope="module")
def results(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    evaluated(runs, out)
    return out


def test_figures_are_those_of_evaluation_inside_training(runs: Path, results: Path) -> None:
    """The run's first evaluation is the base's, its last one compares with it, as --baseline base does."""
    recorded = [row for row in metrics(runs / "better") if "eval/win_rate" in row]
    found = json.loads((results / "eval.json").read_text())
    assert len(recorded) == 2 and found["num_prefixes"] == 12 and found["step"] == 6
    for row, policy in ((recorded[0], "baseline_policy"), (recorded[1], "policy")):
        figures = found[policy]["held_out"]
        for name, figure in figures.items():
            value = figure["value"] if isinstance(figure, dict) else figure
            assert row[f"eval/{name}"] == pytest.approx(value, abs=1e-6), name
            if isinstance(figure, dict) and name != "judge_failure_rate":
                ends = row[f"eval/{name}/low"], row[f"eval/{name}/high"]
                assert ends == pytest.approx((figure["low"], figure["high"]), abs=1e-6), name
    assert recorded[0]["eval/win_rate"] == recorded[0]["eval/coherence_win_rate"] == 0.5
    assert {"win_rate", "coherence_win_rate", "safety", "factuality", "heldout_loss", "diversity"} <= set(
        found["policy"]["held_out"]
    )


def test_figures_follow_from_the_continuations(runs: Path, results: Path, mesh: Mesh) -> None:
    """Asked again one by one, of a judge of one's own."""
    cfg = parse_config(recorded_settings(runs / "better" / "run")[0], "test")
    judge = HeuristicJudge.from_texts(open_corpus(cfg, mesh).texts(2000))
    world, rows = World(seed=0, num_people=48), read_jsonl(results / "continuations.jsonl")
    assert len(rows) == 12
    means: dict[str, list[float]] = {}
    for row in rows:
        prefix, ours, theirs = row["prefix"], row["continuation"], row["baseline"]
        original = row["original"]
        answers = judge.judge(
            [
                PairQuestion(prefix, ours, theirs),
                SafetyQuestion(ours),
                FactualityQuestion(prefix, original, ours),
            ]
        )
        wins, safety, factuality = (a.value for a in answers if isinstance(a, Score))
        a, b = measure(world, prefix, ours).coherence, measure(world, prefix, theirs).coherence
        values = {"win_rate": wins, "safety": safety, "factuality": factuality, "coherence": a}
        values |= {"coherence_win_rate": (1 + np.sign(a - b)) / 2}
        for name, value in values.items():
            assert row[name] == pytest.approx(value)
            means.setdefault(name, []).append(value)
    found = json.loads((results / "eval.json").read_text())
    assert (
        found["judge"] == "heuristic"
        and len(set(means["win_rate"])) > 1
        and np.mean(means["win_rate"]) != 0.5
    )
    for name, values in means.items():
        figure = found["policy"]["held_out"][name]
        assert figure["value"] == pytest.approx(np.mean(values)) and figure["n"] == 12
        assert figure["low"] <= figure["value"] <= figure["high"]
        if name not in ("win_rate", "coherence_win_rate"):
            base = found["baseline_policy"]["held_out"][name]["value"]
            gain = found["gains"]["held_out"].get(name)
            assert (gain is None) == (base == 0)
            if gain is not None:
                assert gain["value"] == pytest.approx(np.mean(values) / base - 1)


def test_safe_and_unsafe_prefixes_are_told_apart(runs: Path, tmp_path: Path) -> None:
    """By the world's judge here, whose documents insult a few of the people."""
    settings, _ = recorded_settings(runs / "better" / "run")
    settings = {**settings, "judge": {"backend": "world"}, "eval": {"num_prefixes": 30}}
    found = evaluate_checkpoint(runs / "better" / "run", tmp_path, settings, baseline=runs / "base" / "run")
    rows = read_jsonl(tmp_path / "continuations.jsonl")
    judge = WorldJudge(World(seed=0, num_people=48))
    answers = judge.judge([SafetyQuestion(row["prefix"]) for row in rows])
    safe = np.array([isinstance(a, Score) and a.value == 1.0 for a in answers])
    assert 0 < safe.sum() < 30 and found["policy"]["safe_prefixes"]["heldout_loss"]["n"] == safe.sum()
    for kind, these in (("safe_prefixes", safe), ("unsafe_prefixes", ~safe)):
        for name in ("heldout_loss", "coherence", "win_rate"):
            values = [row[name] for row, is_one in zip(rows, these, strict=True) if is_one]
            assert found["policy"][kind][name]["value"] == pytest.approx(np.mean(values))
        assert "win_rate" not in found["baseline_policy"][kind]


def test_loss_and_diversity_are_transformers(runs: Path, results: Path, mesh: Mesh) -> None:
    found = json.loads((results / "eval.json").read_text())
    losses = {}
    for name, run in (("policy", "better"), ("baseline_policy", "base")):
        policy = load_policy(runs / run / "run")
        llama = llama_of(policy.model, policy.tokenizer.vocab_size)
        cfg = parse_config(recorded_settings(runs / "better" / "run")[0], "test")
        samples = open_corpus(cfg, mesh, policy.tokenizer).held_out
        with torch.no_grad():
            nats = [llama_logprobs(llama, s.prefix_ids.tolist(), s.suffix_ids.tolist()) for s in samples]
            if name == "policy":
                write: Any = llama.generate  # pyright: ignore[reportAttributeAccessIssue]
                greedy = [
                    write(
                        torch.tensor([s.prefix_ids.tolist()]),
                        max_new_tokens=12,
                        do_sample=False,
                        eos_token_id=None,
                    )[0, len(s.prefix_ids) :].tolist()
                    for s in samples
                ]
                texts = [policy.tokenizer.decode(ids) for ids in greedy]
        losses[name] = -torch.cat(nats).double().mean().item()
        assert found[name]["held_out"]["heldout_loss"]["value"] == pytest.approx(losses[name], abs=1e-5)
    assert [row["continuation"] for row in read_jsonl(results / "continuations.jsonl")] == texts
    for n, figure in ((1, "distinct_1"), (2, "diversity"), (3, "distinct_3")):
        grams = [tuple(ids[i : i + n]) for ids in greedy for i in range(12 - n + 1)]
        assert found["policy"]["held_out"][figure] == pytest.approx(len(set(grams)) / len(grams))
    counts = Counter(token for ids in greedy for token in ids).values()
    entropy = -sum(c / 144 * math.log(c / 144) for c in counts)
    assert found["policy"]["held_out"]["token_entropy"] == pytest.approx(entropy)
    difference = found["gains"]["held_out_difference"]["heldout_loss"]
    assert difference["value"] == pytest.approx(losses["policy"] - losses["baseline_policy"], abs=1e-5)
    assert difference["low"] < difference["high"]


def test_a_policy_against_itself_wins_half(runs: Path, tmp_path: Path) -> None:
    found = evaluated(runs, tmp_path, baseline=runs / "better" / "run")
    for name in ("win_rate", "coherence_win_rate"):
        figure = found["policy"]["held_out"][name]
        assert (figure["value"], figure["low"], figure["high"]) == (0.5, 0.5, 0.5)
    for gains in (found["gains"]["held_out"], found["gains"]["held_out_difference"]):
        assert all(gain["value"] == gain["low"] == gain["high"] == 0 for gain in gains.values())


class FailingJudge:
    name = "failing"

    def judge(self, questions: Any, *, seed: int = 0) -> Any:
        return [Failure("asleep") for _ in questions]


def test_failures_of_the_judge_are_told_with_their_reason(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sleepy:
        """Answers nothing about factuality, and stumbles over one pair."""

        def __init__(self, *arguments: Any) -> None:
            self._judge = open_judge(*arguments)
            self.name = self._judge.name

        def judge(self, questions: Any, *, seed: int = 0) -> Any:
            answers = self._judge.judge(questions, seed=seed)
            pair = next((n for n, q in enumerate(questions) if isinstance(q, PairQuestion)), None)
            for number, question in enumerate(questions):
                if isinstance(question, FactualityQuestion):
                    answers[number] = Failure("asleep")
                elif number == pair:
                    answers[number] = Failure("tripped")
            return answers

    monkeypatch.setattr(command, "open_judge", Sleepy)
    found = evaluated(runs, tmp_path, baseline=None)
    # 12 prefixes: two orders of a pair, safety, factuality; and each prefix' own safety.
    line = "The heuristic judge failed at 13 of 60 answers, which count for nothing; 12 of them: asleep"
    assert line in found["notes"]
    monkeypatch.undo()
    assert not any("failed" in note for note in evaluated(runs, tmp_path, baseline=None)["notes"])


def test_a_kept_baseline_is_asked_once(
    runs: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same results with it as without; other weights or other questions are another baseline."""
    loaded: list[Path] = []
    load = FrozenPolicy.load

    def counted(path: Path, mesh: Mesh) -> Any:
        loaded.append(path)
        return load(path, mesh)

    monkeypatch.setattr(FrozenPolicy, "load", counted)
    kept, asked_again = tmp_path / "kept", []
    base, better = runs / "base" / "run", runs / "better" / "run"
    for name, change, baseline in (
        ("first", {}, base),
        ("again", {}, base),
        ("fewer", {"eval": {"num_prefixes": 5}}, base),
        ("other judge", {"judge": {"backend": "world"}}, base),
        ("other weights", {}, better),
    ):
        settings, _ = recorded_settings(better)
        out, before = tmp_path / name, len(loaded)
        evaluate_checkpoint(better, out, {**settings, **change}, baseline=baseline, kept=kept)
        asked_again.append(len(loaded) - before)
        if name in ("first", "again"):
            for file in ("eval.json", "continuations.jsonl"):
                assert (out / file).read_bytes() == (results / file).read_bytes()
    assert asked_again == [2, 1, 2, 2, 2] and len(list(kept.iterdir())) == 4

    monkeypatch.setattr(command, "open_judge", lambda *_: FailingJudge())
    settings, _ = recorded_settings(better)
    evaluate_checkpoint(
        better,
        tmp_path / "failed",
        {**settings, "seed": 3, "eval": {"num_prefixes": 4}},
        baseline=base,
        kept=kept,
    )
    assert len(list(kept.iterdir())) == 4, "what the judge failed at is asked again"
    monkeypatch.undo()

    for file in kept.iterdir():
        file.write_text('{"figures": {}}')
    with pytest.raises(DataError, match="not a kept evaluation"):
        evaluated(runs, tmp_path / "damaged", kept=kept)
    assert not (tmp_path / "damaged").exists()


def test_command_with_sets_prints_a_table(sip: Sip, runs: Path) -> None:
    write_jsonl(Path("p.jsonl"), [RTP, {"prompt": {"text": "Dara was", "toxicity": 0.9}}])
    write_jsonl(Path("qa_data.json"), [QA] * 3)
    Path("mc_task.json").write_text(json.dumps([MC]))
    Path("x.csv").write_text("id,prompt,type,label\n1,Who?,t,safe\n2,What?,t,unsafe\n")
    code, _, err = sip(
        "eval",
        runs / "better" / "run",
        *("--baseline", runs / "base" / "run", "--out", "out", "--limit", 2, "--max-new-tokens", 6),
        *("--set", "realtoxicityprompts=p.jsonl", "--set", "halueval=qa_data.json"),
        *("--set", "truthfulqa=mc_task.json", "--set", "xstest=x.csv", "--eval.num_prefixes", 4),
    )
    assert code == 0, err
    found = json.loads(Path("out/eval.json").read_text())
    shown = err[err.index("4 held-out prefixes; shares") : err.index("95% intervals")]
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    wide = StringIO()
    Console(width=150, file=wide).print(comparison_table(found))
    cells = [re.split(r"  +", line.strip()) for line in wide.getvalue().splitlines()]
    lines = {row[0]: row[1:] for row in cells}
    for name in ("win rate", "coherence win rate", "halueval qa: accuracy per byte", "safety average"):
        assert name in lines
    loss = found["policy"]["held_out"]["heldout_loss"], found["baseline_policy"]["held_out"]["heldout_loss"]
    interval = f"{loss[0]['low']:.3f}–{loss[0]['high']:.3f}"
    assert lines["heldout loss"][:3] == [f"{loss[0]['value']:.3f}", interval, f"{loss[1]['value']:.3f}"]
    shift = found["gains"]["held_out_difference"]["heldout_loss"]["value"]
    assert lines["heldout loss"][3].startswith(f"{shift:+.3f} (")
    assert lines["diversity"][0] == f"{100 * found['policy']['held_out']['diversity']:.1f}"
    sets = found["policy"]["sets"]
    assert found["num_prefixes"] == 4 and set(sets) == {
        "realtoxicityprompts",
        "halueval_qa",
        "truthfulqa",
        "xstest",
    }
    assert sets["halueval_qa"]["accuracy"]["n"] == 2 and sets["truthfulqa"]["mc1"]["n"] == 1
    assert sets["xstest"]["safety"]["n"] == 2 and sets["xstest"]["safety, unsafe prompts"]["n"] == 1
    rows = read_jsonl(Path("out/continuations.jsonl"))
    assert Counter(row["set"] for row in rows) == {
        "held-out": 4,
        "realtoxicityprompts": 2,
        "halueval_qa": 2,
        "truthfulqa": 1,
        "xstest": 2,
    }
    safety = [row["safety"] for row in rows if "safety" in row]
    average = found["policy"]["safety_average"]
    assert len(safety) == 8 and average["value"] == pytest.approx(np.mean(safety)) and average["n"] == 8
    assert average["of"] == ["held_out", "realtoxicityprompts", "xstest"]
    mean = found["policy"]["factuality_average"]
    assert set(mean["of"]) == {
        "held_out/factuality",
        "halueval_qa/accuracy",
        "truthfulqa/mc1",
        "truthfulqa/mc2",
    }
    parts = [sets["halueval_qa"]["accuracy"], sets["truthfulqa"]["mc1"], sets["truthfulqa"]["mc2"]]
    values = [found["policy"]["held_out"]["factuality"]["value"], *(p["value"] for p in parts)]
    assert mean["value"] == pytest.approx(np.mean(values))
    assert "logprobs" in rows[6]["baseline"] and rows[6]["baseline"]["logprobs"] != rows[6]["logprobs"]
    assert found["gains"]["sets"]["truthfulqa"]["mc2"]["n"] == 1


def test_without_a_baseline_there_are_no_win_rates(sip: Sip, runs: Path, tmp_path: Path) -> None:
    """Also: a config of one's own, with documents instead of the world, so the heuristic judge."""
    write_texts(Path("texts"), 80)
    Path("own.toml").write_text(
        '[data]\npath = "texts"\nsuffix_tokens = 8\nmax_prefix_tokens = 20\nmin_prefix_tokens = 4\nholdout = 0.1\n'
        "[eval]\nnum_prefixes = 3\n"
    )
    code, _, err = sip("eval", runs / "base" / "run", "--config", "own.toml", "--out", "out")
    assert code == 0, err
    found = json.loads(Path("out/eval.json").read_text())
    assert found["judge"] == "heuristic" and "baseline" not in found and "gains" not in found
    assert not {"win_rate", "coherence", "coherence_win_rate"} & set(found["policy"]["held_out"])
    assert any("No win rates" in note for note in found["notes"])
    assert any("No coherence: the heuristic judge" in note for note in found["notes"])
    assert "No coherence" in err


def test_bad_input_is_one_line_and_leaves_nothing(
    sip: Sip,
    runs: Path,
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    run, base = runs / "better" / "run", runs / "base" / "run"
    Path("file").write_text("")
    Path("bad.toml").write_text("[data\n")
    Path("long.toml").write_text('[data]\npath = "texts"\nmax_prefix_tokens = 60\nsuffix_tokens = 12\n')
    Path("x.csv").write_text("id,prompt,type,label\n1,a,t\n")
    other = {"data": {**run_config(Path()).data.model_dump(), "vocab_size": 420, "cache": Path("cache")}}
    train(run_config(Path("other"), steps=1, eval={"generate": False}, **other), mesh)
    shutil.copytree(resolve_checkpoint(base), "damaged")
    shutil.copytree(resolve_checkpoint(base), "imported")
    (Path("damaged") / "tokenizer.model").write_bytes(b"")
    rewrite_state(Path("imported"))
    cases: list[tuple[list[object], int, str]] = [
        (["nowhere", "--out", "out"], 4, "nowhere: no checkpoint here"),
        ([run], 2, "Missing option '--out'"),
        ([run, "--out", "file"], 3, "file: a folder cannot be written there"),
        ([run, "--out", "file/below"], 3, "file is not a writable folder"),
        ([run, "--out", "out", "--baseline", "nowhere"], 4, "nowhere: no checkpoint here"),
        ([run, "--out", "out", "--baseline", "damaged"], 4, "damaged/tokenizer.model: missing or damaged"),
        (
            [run, "--out", "out", "--baseline", "other/run"],
            4,
            "a baseline with another tokenizer (420 tokens",
        ),
        ([run, "--out", "out", "--config", "none.toml"], 2, "none.toml: no such config file"),
        ([run, "--out", "out", "--config", "bad.toml"], 2, "bad.toml: not a readable TOML file"),
        ([run, "--out", "out", "--config", "long.toml"], 2, "72 exceed model.max_context=64"),
        ([run, "--out", "out", "--eval.prefixes", "3"], 2, "unknown key 'eval.prefixes'"),
        ([run, "--out", "out", "--basline", base], 2, "unknown key 'basline'"),
        ([run, "--out", "out", "--eval.num_prefixes", "0"], 2, "eval.num_prefixes"),
        (["imported", "--out", "out"], 2, "carries no settings"),
        ([run, "--out", "out", "--set", "xstest"], 2, "must be NAME=PATH"),
        ([run, "--out", "out", "--set", "xtest=x.csv"], 2, "--set xtest: no such set"),
        ([run, "--out", "out", "--set", "xstest=x.csv"], 3, "x.csv:2: not as many columns as the header"),
        ([run, "--out", "out", "--limit", "0"], 2, "--limit 0"),
        ([run, "--out", "out", "--max-new-tokens", "0"], 5, "max_new_tokens=0"),
        ([run, "--out", "out", "--tensor-parallel", "2"], 2, "1 processes cannot hold tensor_parallel=2"),
        ([run, "--out", "out", "--tasks", "boolq"], 2, "pip install lm-eval"),
    ]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for arguments, code, words in cases:
        fails(sip("eval", *arguments), code, words)
        assert not Path("out").exists(), arguments


def rewrite_state(folder: Path) -> None:
    """Take the run's settings out of a checkpoint, as one that was imported has none."""
    from sip_engine.policy.checkpoint_files import write_manifest

    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"run": {}}))
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def test_a_set_given_twice_is_refused(sip: Sip, runs: Path) -> None:
    write_jsonl(Path("qa_data.json"), [QA])
    sets = ["--set", "halueval=qa_data.json"] * 2
    fails(sip("eval", runs / "base" / "run", "--out", "out", *sets), 2, "halueval_qa is given twice")


def test_answers_that_cannot_fit_are_one_line(sip: Sip, runs: Path) -> None:
    write_jsonl(Path("p.jsonl"), [RTP])
    arguments = ["--set", "realtoxicityprompts=p.jsonl", "--max-new-tokens", 64, "--eval.num_prefixes", 2]
    code, _, err = sip("eval", runs / "base" / "run", "--out", "out", *arguments)
    assert code == 5 and "exceed the model's context of 64" in err.splitlines()[-1]
    assert not Path("out/eval.json").exists()


def evaluate_on_ranks(folder: Path, arguments: str) -> None:
    runs, tensor = json.loads(arguments)
    sets = [f"xstest={folder / 'x.csv'}", f"truthfulqa={folder / 'mc_task.json'}"]
    start_mesh(tensor)
    evaluated(Path(runs), folder / "out", sets=sets, tensor_parallel=tensor)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2], ids=["data parallel", "tensor parallel"])
def test_two_processes_find_the_same(runs: Path, tmp_path: Path, tensor: int) -> None:
    questions = "".join(f"{n},Where does {w} live?,t,safe\n" for n, w in enumerate(("she", "he", "Dara")))
    (tmp_path / "x.csv").write_text("id,prompt,type,label\n" + questions)
    wrong = {
        "question": "Who?",
        "mc1_targets": {"Dara": 1, "no one": 0},
        "mc2_targets": {"Dara": 1, "no one": 0},
    }
    (tmp_path / "mc_task.json").write_text(json.dumps([MC, wrong]))
    run_ranks("test_eval_command:evaluate_on_ranks", 2, tmp_path, json.dumps([str(runs), tensor]))
    sets = [f"xstest={tmp_path / 'x.csv'}", f"truthfulqa={tmp_path / 'mc_task.json'}"]
    evaluated(runs, tmp_path / "alone", sets=sets)
    together, alone = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("out", "alone"))
    assert flat(together) == pytest.approx(flat(alone), abs=1e-5)
    rows = [read_jsonl(tmp_path / name / "continuations.jsonl") for name in ("out", "alone")]
    assert [row.get("continuation") for row in rows[0]] == [row.get("continuation") for row in rows[1]]


def flat(value: Any, path: str = "") -> dict[str, float]:
    """Every number of nested JSON by its path."""
    if isinstance(value, dict):
        return {name: one for key, part in value.items() for name, one in flat(part, f"{path}/{key}").items()}
    return {path: value} if isinstance(value, int | float) else {}
