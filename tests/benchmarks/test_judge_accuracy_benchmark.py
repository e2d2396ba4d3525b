"""The benchmark of a judge's accuracy: prompts read back as questions, and what counts as right."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import judge_accuracy
from benchmarks.judge_accuracy import known_answers, measure, question_of
from sip_engine.config.judge import LocalModelConfig
from sip_engine.llm.compact_prompts import compact_prompt, reading_prompt
from sip_engine.types import Cost, FactualityQuestion, Failure, PairQuestion, Question, SafetyQuestion, Score
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_jsonl

QUESTIONS: list[tuple[Question, str, str]] = [
    (PairQuestion("a\nb", "c", "d"), "1", "quality"),
    (PairQuestion("a\nb", "d", "c"), "2", "quality"),
    (PairQuestion("p", "e", "f"), "1", "quality"),
    (PairQuestion("p", "f", "e"), "2", "quality"),
    (SafetyQuestion("x"), "no", "safety"),
    (FactualityQuestion("p", "r", "s"), "possible", "factuality"),
    (FactualityQuestion("p", "r", "t"), "definite", "factuality"),
]


def test_prompts_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    records = [{"prompt": compact_prompt(q), "answer": answer, "kind": kind} for q, answer, kind in QUESTIONS]
    write_jsonl(path, [*records, {"text": "ab", "labels": [[1, "T"]], "kind": "rollout"}])
    known = known_answers(path)
    assert [q for pairs in known.values() for q, _ in pairs] == [q for q, *_ in QUESTIONS]
    assert [value for _, value in known["factuality"]] == [0.5, 0.0] and known["quality"][1][1] == 0.0
    with pytest.raises(DataError, match="not a prompt"):
        question_of(reading_prompt("p", "x")[0])
    write_jsonl(path, [records[0] | {"answer": "yes"}])
    with pytest.raises(DataError, match="answers no such question"):
        known_answers(path)


def test_right_is_what_is_nearest_and_a_tie_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "quality": [Score(0.6), Score(0.5), Score(0.9), Failure("too long", Cost(1, 3))],
        "safety": [Score(0.4)],
        "factuality": [Score(0.3), Score(0.25)],
    }

    class Fixed:
        def __init__(self, model: Any) -> None:
            self.method = model.cfg.method

        def judge(self, questions: list[Question]) -> list[Any]:
            (kind,) = {kind for q, _, kind in QUESTIONS if q in questions}
            return [Score(1.0)] * len(questions) if self.method == "sentence_labels" else found[kind]

    monkeypatch.setattr(judge_accuracy, "LocalJudge", Fixed)
    monkeypatch.setattr(
        judge_accuracy, "LocalModel", lambda policy, cfg: SimpleNamespace(policy=policy, cfg=cfg)
    )
    known: dict[str, list[tuple[Question, float]]] = {"quality": [], "safety": [], "factuality": []}
    for question, answer, kind in QUESTIONS:
        value = {"1": 1.0, "2": 0.0, "no": 0.0, "possible": 0.5, "definite": 0.0}[answer]
        known[kind].append((question, value))
    model = cast(Any, SimpleNamespace(policy=None, cfg=LocalModelConfig()))
    rows = {(row["kind"], row["method"]): row for row in measure(model, known)}
    assert {key: (row["accuracy"], row["answered"]) for key, row in rows.items()} == {
        ("quality", "log_odds"): (2 / 3, 3),
        ("quality", "sentence_labels"): (0.5, 4),
        ("safety", "log_odds"): (1.0, 1),
        ("safety", "sentence_labels"): (0.0, 1),
        ("factuality", "log_odds"): (0.5, 2),
        ("factuality", "sentence_labels"): (0.0, 2),
    }
    assert rows["quality", "log_odds"]["tokens"] == 3


@pytest.mark.parametrize(
    ("changes", "message", "code"),
    [
        ({"--prompts": "none.jsonl"}, "none.jsonl: cannot be read", 3),
        ({"--out": "file/a.csv"}, "file is not a writable folder", 3),
        ({"--max-prefix-chars": "-5"}, "must be 1 or more", 2),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    message: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("p.jsonl").write_text("5\n")
    arguments = {"--judge": "nowhere", "--prompts": "p.jsonl", "--out": "a.csv"} | changes
    try:
        found = judge_accuracy.main([word for pair in arguments.items() for word in pair])
    except SystemExit as end:  # argparse
        found = end.code
    assert found == code and message in capsys.readouterr().err
