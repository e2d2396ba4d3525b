"""Prompts made for judge and rewriter: known answers agree with the world's truth, and nothing gives them away."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from label_settings import config

from sip_engine.data.corpus import Corpus, open_corpus
from sip_engine.data.prompts import read_prompts
from sip_engine.distributed.mesh import Mesh
from sip_engine.llm.compact_prompts import compact_prompt
from sip_engine.tasks.corruptors.rules import RuleCorruptor
from sip_engine.tasks.corruptors.world import WorldCorruptor
from sip_engine.tasks.files import write_records
from sip_engine.tasks.judge_pairs import judge_records
from sip_engine.tasks.labels import LABEL_VOTES, records_of_labels
from sip_engine.tasks.rewrites import rewrite_records
from sip_engine.tasks.specs import JudgePairs, Rewrites
from sip_engine.types import (
    FactualityQuestion,
    Failure,
    Judgment,
    PairQuestion,
    RewriteRequest,
    SafetyQuestion,
    Score,
)
from sip_engine.utils.errors import ConfigError, DataError
from sip_engine.world import World, WorldJudge, WorldRewriter, measure

WORLD = World(seed=0, num_people=48)


@pytest.fixture(scope="module")
def corpus(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(config(tmp_path_factory.mktemp("makers")), mesh)


def test_judge_records_hold_the_truth(corpus: Corpus) -> None:
    samples, judge = corpus.stream.samples_at(0, 120), WorldJudge(WORLD)
    records = judge_records(
        samples,
        WorldCorruptor(WORLD),
        judge,
        corpus.tokenizer,
        num_pairs=40,
        num_safety=20,
        max_prefix_chars=None,
        seed=1,
    )
    pairs = [r for r in records if r["kind"] == "quality"]
    safety = [r for r in records if r["kind"] == "safety"]
    assert len(pairs) > 60 and len(safety) == 20
    assert sum(r["answer"] == "1" for r in pairs) * 2 == len(pairs)
    assert sum(r["answer"] == "yes" for r in safety) == 10
    # Read back what the prompts ask, and let the world answer.
    agreed = 0
    for record in pairs:
        prefix, rest = record["prompt"][1:-1].split("\x02")
        first, second = rest.split("\x03")
        assert max(len(corpus.tokenizer.encode(text)) for text in (first, second)) <= 30
        (answer,) = judge.judge([PairQuestion(prefix, first, second)])
        assert isinstance(answer, Score)
        agreed += answer.value == float(record["answer"] == "1")
    assert agreed > 0.9 * len(pairs)  # cutting a corrupted copy may cut off what spoilt it
    for record in safety:
        (answer,) = judge.judge([SafetyQuestion(record["prompt"][1:-1])])
        assert isinstance(answer, Score) and answer.value == float(record["answer"] == "yes")
    ways = {r["corruption"] for r in pairs}
    assert ways >= {"stutter", "shuffle", "digress"} and "" not in ways
    for record in pairs:
        worse = record["prompt"][1:-1].split("\x02")[1].split("\x03")[2 - int(record["answer"])]
        doubled = sum(a.strip(".,") == b.strip(".,") for a, b in pairwise(worse.split()))
        assert record["corruption"] != "stutter" or doubled > len(worse.split()) / 5
    swapped = {r["prompt"]: r["answer"] for r in pairs}
    for record in pairs:
        prefix, rest = record["prompt"][1:-1].split("\x02")
        first, second = rest.split("\x03")
        assert swapped[compact_prompt(PairQuestion(prefix, second, first))] != record["answer"]


def test_factuality_labels(corpus: Corpus) -> None:
    """Read back from the prompts, by the world's own measure."""
    samples = corpus.stream.samples_at(0, 150)
    records = judge_records(
        samples,
        WorldCorruptor(WORLD),
        WorldJudge(WORLD),
        corpus.tokenizer,
        num_pairs=60,
        num_safety=0,
        num_factuality=9,
        max_prefix_chars=None,
        seed=1,
    )
    labelled = [r for r in records if r["kind"] == "factuality"]
    assert Counter(r["answer"] for r in labelled) == {"none": 3, "possible": 3, "definite": 3}
    for record in labelled:
        prefix, rest = record["prompt"][1:-1].split("\x06")
        found = measure(WORLD, prefix, rest.split("\x02")[1]).factuality
        assert record["answer"] == ("none" if found == 1 else "definite" if found == 0 else "possible")


def test_rewrite_records_copy_what_is_safe(corpus: Corpus) -> None:
    samples, judge = corpus.stream.samples_at(0, 150), WorldJudge(WORLD)
    records = rewrite_records(samples, judge, WorldRewriter(WORLD), corpus.tokenizer, num=30, seed=1)
    assert sum(r["safe"] for r in records) == 15 and len(records) >= 28
    for record in records:
        (original, answer) = judge.judge([SafetyQuestion(record["suffix"]), SafetyQuestion(record["answer"])])
        assert isinstance(original, Score) and isinstance(answer, Score)
        assert original.value == float(record["safe"])
        assert answer.value == 1.0
        assert not record["safe"] or record["answer"] == record["suffix"]
        assert record["prompt"].endswith(f"\x02{record['suffix']}\x04")


class Doubtful:
    """Calls texts with an x unsafe; in the last vote it changes its mind about those with a q, and fails on z."""

    name = "doubtful"

    def __init__(self, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self.seeds: list[int] = []

    def judge(self, questions, *, seed: int = 0):
        self.seeds.append(seed)
        last = len(self.seeds) == LABEL_VOTES

        def one(text: str):
            if last and "z" in text:
                return Failure("no")
            return Score(float(("x" in text) == (last and "q" in text)))

        return [one(question.suffix) for question in questions]


def test_labels_are_unanimous(corpus: Corpus) -> None:
    from dataclasses import replace

    (sample,) = corpus.stream.samples_at(0, 1)
    samples = [replace(sample, suffix=text) for text in ("ok", "q", "x", "z", "fine", "xx", "xq", "xz")]

    def labels(judge: Doubtful) -> dict[str, str]:
        made = judge_records(
            samples,
            RuleCorruptor(),
            judge,
            corpus.tokenizer,
            num_pairs=0,
            num_safety=99,
            max_prefix_chars=None,
            seed=0,
        )
        return {record["prompt"][1:-1]: record["answer"] for record in made}

    assert labels(judge := Doubtful()) == {"ok": "yes", "fine": "yes", "x": "no", "xx": "no"}
    assert len(set(judge.seeds)) == len(judge.seeds) == LABEL_VOTES == 8
    everything = {s.suffix: "no" if "x" in s.suffix else "yes" for s in samples}
    assert labels(judge := Doubtful(deterministic=True)) == everything and len(judge.seeds) == 1


class Fractions:
    """Answers with the numbers that a text holds: in vote n the nth of them, over and over."""

    name = "fractions"

    def __init__(self, deterministic: bool) -> None:
        self.deterministic = deterministic
        self.votes = 0

    def judge(self, questions, *, seed: int = 0) -> list[Judgment]:
        del seed
        self.votes += 1
        texts = [question.suffix.split() for question in questions]
        return [Score(float(numbers[(self.votes - 1) % len(numbers)])) for numbers in texts]


@pytest.mark.parametrize(
    ("deterministic", "unsafe"), [(True, ["0.07", "0.4999", "0"]), (False, ["0.07 0.3", "0.4999", "0"])]
)
def test_probabilities_are_labels_of_safety(corpus: Corpus, deterministic: bool, unsafe: list[str]) -> None:
    """Votes agree where they decide alike; a tie decides nothing."""
    from dataclasses import replace

    safe = ["0.93", "0.5001 0.8" if not deterministic else "0.5001", "1"]
    unclear = ["0.5"] if deterministic else ["0.5", "0.9 0.5", "0.6 0.4"]
    texts = [*unclear, *safe, *unsafe]
    made = records_of_labels(
        [SafetyQuestion(text) for text in texts], Fractions(deterministic), 99, "safety", None
    )
    found = {record["prompt"][1:-1]: record["answer"] for record in made}
    assert found == dict.fromkeys(safe, "yes") | dict.fromkeys(unsafe, "no")
    (sample,) = corpus.stream.samples_at(0, 1)
    samples = [replace(sample, suffix=text) for text in texts]
    rewrites = rewrite_records(
        samples, Fractions(deterministic), WorldRewriter(WORLD), corpus.tokenizer, num=6, seed=0
    )
    assert {r["suffix"]: r["safe"] for r in rewrites} == {text: found[text] == "yes" for text in found}


def test_any_fraction_of_factuality_is_possible() -> None:
    texts = ["1", "0", "0.98", "0.02 0.5", "0 0.02", "1 0.98"]
    questions = [FactualityQuestion("p", "r", text) for text in texts]
    found = {}
    for text, question in zip(texts, questions, strict=True):
        others = [FactualityQuestion("p", "r", other) for other in ("1", "0.5", "0")]
        made = records_of_labels([question, *others], Fractions(False), 6, "factuality", None)
        answers = {r["prompt"]: r["answer"] for r in made}
        found[text] = answers.get(compact_prompt(question))
    clear = {"1": "none", "0": "definite", "0.98": "possible", "0.02 0.5": "possible"}
    assert found == dict.fromkeys(texts) | clear


@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=5), st.integers(0, 9))
def test_rules_change_the_words_or_say_that_they_cannot(suffixes: list[str], seed: int) -> None:
    requests = [RewriteRequest("p", text) for text in suffixes]
    found = RuleCorruptor().corrupt(requests, seed=seed)
    assert found == RuleCorruptor().corrupt(requests, seed=seed)
    for text, worse in zip(suffixes, found, strict=True):
        assert isinstance(worse, Failure) or worse.text.split() != text.split()


def test_files_can_be_trained_on(mesh: Mesh, tmp_path: Path) -> None:
    cfg = config(tmp_path)
    spec = JudgePairs(pairs=20, safety=10, factuality=6, held_out=8, corruptor="world", max_prefix_chars=80)
    spec.make(cfg, tmp_path / "judge")
    Rewrites(num=10, held_out=4).make(cfg, tmp_path / "rewriter")
    made = tmp_path / "cache"
    assert len(list(made.glob("world-*-judge"))) == len(list(made.glob("world-*-rewriter"))) == 1
    from sip_engine.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer.model")
    sizes = {}
    for name in ("judge/train", "judge/eval", "rewriter/train", "rewriter/eval"):
        path = tmp_path / f"{name}.jsonl"
        sizes[name] = len(read_prompts(path, tokenizer, max_prompt_tokens=200, max_answer_tokens=40))
    assert sizes["judge/train"] > 40 and sizes["judge/eval"] > 8 and sizes["rewriter/train"] > 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rewriter": {"backend": "none"}}, "need a teacher"), ({"world": None}, "no documents")],
)
def test_what_is_missing_is_named(mesh: Mesh, tmp_path: Path, changes: dict, message: str) -> None:
    judge = {"judge": {"backend": "heuristic"}} if "world" in changes else {}
    rewriter = {"rewriter": {"backend": "server", "server": {"url": "http://localhost:9/v1", "model": "m"}}}
    cfg = config(tmp_path, **(rewriter if "world" in changes else {}) | judge | changes)
    with pytest.raises(ConfigError, match=message):
        Rewrites(num=4, held_out=2).make(cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["judge", "rewriter"])
def test_prompts_are_no_documents(mesh: Mesh, tmp_path: Path, task: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "p", "answer": "1"}\n')
    cfg = config(
        tmp_path,
        task=task,
        data={"path": prompts, "eval_path": prompts, "max_prefix_tokens": 60, "suffix_tokens": 30},
        objective={"kind": "next_token", "loss_on": "suffix"},
    )
    with pytest.raises(ConfigError, match=f'^task = "{task}" reads prompts; give the config of documents$'):
        spec = JudgePairs(pairs=2, safety=0, held_out=2) if task == "judge" else Rewrites(num=2, held_out=2)
        spec.make(cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def record(text: str) -> dict[str, str]:
        return {"prompt": text, "answer": "1", "kind": "quality"}

    write_records(tmp_path, [record("a")], [record("e")], wanted=1)
    before = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert before.keys() == {"train.jsonl", "eval.jsonl"} and json.loads(before["train.jsonl"]) == record("a")
    with pytest.raises(ConfigError, match="nothing to write"):
        write_records(tmp_path, [], [record("e")], wanted=1)
    (tmp_path / "eval.jsonl").unlink()
    (tmp_path / "eval.jsonl").mkdir()
    with pytest.raises(DataError, match="something else"):
        write_records(tmp_path, [record("c")], [record("g")], wanted=1)
    assert (tmp_path / "train.jsonl").read_text() == before["train.jsonl"]
