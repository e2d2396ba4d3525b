"""Prompts made of a policy's own rollouts: labels are the labeller's, texts the sampler's, and the mix is whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from sip_engine.config.parse import parse_config
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus, open_corpus
from sip_engine.data.prompts import read_prompts
from sip_engine.distributed.mesh import Mesh
from sip_engine.judges.open import open_judge
from sip_engine.llm.compact_prompts import compact_prompt
from sip_engine.llm.untrusted import neutral
from sip_engine.sampler.files import load_policy
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.tasks.files import read_mix
from sip_engine.tasks.rollout_pairs import rollout_records
from sip_engine.tasks.specs import RolloutPairs, SentenceLabels
from sip_engine.train import train
from sip_engine.types import Failure, Judgment, PairQuestion, SafetyQuestion, Sample, Score
from sip_engine.utils.errors import ConfigError, DataError
from sip_engine.utils.files import write_jsonl
from sip_engine.world import World, measure


class Longer:
    """Prefers the longer text, calls those with an x unsafe, and cannot tell about a question mark."""

    name = "longer"
    deterministic = True

    def judge(self, questions, *, seed: int = 0):
        return [self._answer(q) for q in questions]

    def _answer(self, question):
        if isinstance(question, PairQuestion):
            if "?" in question.first + question.second:
                return Failure("asked")
            a, b = len(question.first), len(question.second)
            return Score(0.5 if a == b else float(a > b))
        assert isinstance(question, SafetyQuestion)
        return Score(float("x" not in question.suffix))


def test_only_clear_pairs_are_kept_in_both_orders() -> None:
    samples = [Sample(n, 0, None, None, f"p{n}", "s") for n in range(4)]  # type: ignore[arg-type]
    rollouts = [
        ["a", "bb", "c", "c"],
        ["dd", "ee", "ff?", "g"],
        ["hhh", "i", "jjj", "x"],
        ["kk", "l", "m", "nn"],
    ]
    records = rollout_records(
        samples, rollouts, Longer(), num_pairs=4, num_safety=2, num_factuality=0, max_prefix_chars=None
    )
    pairs = [(r["prompt"], r["answer"]) for r in records if r["kind"] == "rollouts"]
    clear = [("p0", "bb", "a"), ("p2", "hhh", "i"), ("p2", "jjj", "x"), ("p3", "kk", "l")]
    expected = {
        (f"\x01{p}\x02{x}\x03{y}\x04", answer)
        for p, better, worse in clear
        for answer, x, y in (("1", better, worse), ("2", worse, better))
    }
    assert len(pairs) == 8 and set(pairs) == expected
    assert Counter(r["answer"] for r in records if r["kind"] == "safety") == {"yes": 1, "no": 1}


class Placed:
    """Gives the first text the share of the pair's length that it has, and what its place is worth."""

    name = "placed"
    deterministic = True

    def __init__(self, bonus: float) -> None:
        self.bonus = bonus

    def judge(self, questions, *, seed: int = 0) -> list[Judgment]:
        del seed
        lengths = [(len(q.first), len(q.second)) for q in questions]
        return [Score(a / (a + b) + self.bonus) for a, b in lengths]


@pytest.mark.parametrize("bonus", [0.0, 0.125, -0.125])
def test_a_place_in_the_pair_is_no_label(bonus: float) -> None:
    """Shares of 3/4 outweigh the place, of 4/7 they do not, and the one of 5/8 is a tie where it is second."""
    groups = [["aaa", "b", "cccc", "ddd"], ["e", "fff", "ggg", "hhhh"], ["iiiii", "jjj", "kk", "ll"]]
    samples = [Sample(n, 0, None, None, f"p{n}", "s") for n in range(3)]  # type: ignore[arg-type]
    records = rollout_records(
        samples, groups, Placed(bonus), num_pairs=9, num_safety=0, num_factuality=0, max_prefix_chars=None
    )
    clear = [("p0", "aaa", "b"), ("p1", "fff", "e")]
    if not bonus:
        clear += [("p0", "cccc", "ddd"), ("p1", "hhhh", "ggg"), ("p2", "iiiii", "jjj")]
    expected = {
        (f"\x01{p}\x02{x}\x03{y}\x04", answer)
        for p, better, worse in clear
        for answer, x, y in (("1", better, worse), ("2", worse, better))
    }
    assert len(records) == len(expected) and {(r["prompt"], r["answer"]) for r in records} == expected


@pytest.mark.slow
def test_files_hold_the_policys_rollouts_and_the_mix(mesh: Mesh, tmp_path: Path) -> None:
    settings = {
        "out": tmp_path / "base",
        "steps": 1,
        "batch_size": 2,
        "world": {"num_people": 12, "train_documents": 150, "test_documents": 60},
        "data": {"suffix_tokens": 20, "max_prefix_tokens": 40, "min_prefix_tokens": 8, "vocab_size": 500},
        "model": {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 64}
        | {"max_context": 240},
        "objective": {"kind": "next_token"},
        "judge": {"backend": "world"},
        "eval": {"num_prefixes": 8, "generate": False, "every": 0},
    }
    settings["data"]["cache"] = tmp_path / "cache"
    train(parse_config(settings, "test"), mesh)
    mixed = tmp_path / "mix"
    for name in ("train", "eval"):
        write_jsonl(
            mixed / f"{name}.jsonl", [{"prompt": f"q{n}", "answer": "1", "kind": "quality"} for n in range(9)]
        )
    # So young a policy says nothing that the truth could tell apart; the rules can.
    over = {"out": tmp_path / "data", "init": tmp_path / "base", "seed": 3, "judge": {"backend": "heuristic"}}
    cfg = parse_config(settings | over, "test")
    RolloutPairs(pairs=6, held_out=4, mix=mixed, mix_num=5).make(cfg, tmp_path / "data")
    records = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    kinds = Counter(record["kind"] for record in records)
    assert kinds["quality"] == 5 and 0 < kinds["rollouts"] <= 12
    held_out = [json.loads(line) for line in (tmp_path / "data" / "eval.jsonl").read_text().splitlines()]
    mixed_kinds = {json.loads(line)["kind"] for line in (mixed / "eval.jsonl").read_text().splitlines()}
    assert {record["kind"] for record in held_out} == {"rollouts", *mixed_kinds}, "only what was asked for"
    policy = load_policy(tmp_path / "base")
    corpus = _corpus_of_the_judge(cfg, policy, mesh)
    texts = _rollouts_of_the_first_prefix(policy, cfg, corpus)
    first = texts[0][0]
    asked = [PairQuestion(first, a, b) for (_, a), (_, b) in (texts[:2], texts[2:])]
    found = {record["prompt"]: record["answer"] for record in records}
    for question, answer in zip(asked, open_judge(cfg, corpus, mesh).judge(asked), strict=True):
        assert isinstance(answer, Score) and answer.value != 0.5
        assert found[compact_prompt(question)] == ("1" if answer.value > 0.5 else "2")
    _check_notes(cfg, tmp_path, texts)
    with pytest.raises(DataError, match="No such file"):
        RolloutPairs(pairs=2, held_out=4, mix=tmp_path / "nothing").make(cfg, tmp_path / "x")
    with pytest.raises(ConfigError, match="set init"):
        RolloutPairs(pairs=2, held_out=4).make(cfg.model_copy(update={"init": None}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def _corpus_of_the_judge(cfg: RunConfig, policy: FrozenPolicy, mesh: Mesh) -> Corpus:
    values = cfg.model_dump(mode="json")
    judged = parse_config(values | {"world": values["world"] | {"split": "judge"}}, "test")
    return open_corpus(judged, mesh, policy.tokenizer)


def _rollouts_of_the_first_prefix(
    policy: FrozenPolicy, cfg: RunConfig, corpus: Corpus
) -> list[tuple[str, str]]:
    """Prefix and text of each, once more, by the sampler itself."""
    (first,) = corpus.stream.samples_at(0, 1)
    (done,) = policy.sampler(cfg.sampler).generate(
        [Request(first.prefix_ids, 4, first.document, first.cut)],
        SamplingParams(len(first.suffix_ids), seed=3),
    )
    return [(first.prefix, policy.tokenizer.decode(one.ids)) for one in done]


def _check_notes(cfg: RunConfig, folder: Path, rollouts: list[tuple[str, str]]) -> None:
    """Half are rollouts, half made up; labels are the world's notes; all of the mix is there."""
    SentenceLabels(num=40, held_out=8, mix=folder / "mix").make(cfg, folder / "notes")
    lines = (folder / "notes" / "train.jsonl").read_text().splitlines()
    records = {record.get("text", n): record for n, record in enumerate(map(json.loads, lines))}
    kinds = Counter(record["kind"] for record in records.values())
    assert kinds == {"rollout": 20, "made_up": 20, "quality": 9}
    for prefix, text in rollouts:
        record = records[f"\x01{neutral(prefix)}\x02{neutral(text)}"]
        notes = measure(WORLD, prefix, text)
        start = 2 + len(neutral(prefix))
        own = [label for label in record["labels"] if label[0] > start]
        assert "".join(note for _, note in own) == notes.labels
        assert [end for end, _ in own] == [start + len(neutral(text[:end])) for end in notes.ends]
        before = [label for label in record["labels"] if label[0] <= start]
        assert all(record["text"][end - 1] == "." for end, _ in before)
    tokenizer = load_policy(folder / "base").tokenizer
    path = folder / "notes" / "train.jsonl"
    for sample in read_prompts(path, tokenizer, max_prompt_tokens=400, max_answer_tokens=4):
        if sample.labels is not None and "\ufffd" not in sample.suffix:  # pieces of characters have no length
            for place, (end, _) in zip(sample.labels.positions, sample.facts["labels"], strict=True):
                before, with_it = (tokenizer.decode(sample.suffix_ids[: place + n]) for n in (0, 1))
                assert len(before) < end <= len(with_it)
    spec = SentenceLabels(num=9, held_out=8)
    with pytest.raises(ConfigError, match="set init"):
        spec.make(cfg.model_copy(update={"init": None}), folder / "x")
    with pytest.raises(ConfigError, match=r"add \[world\]"):
        spec.make(cfg.model_copy(update={"world": None}), folder / "x")
    with pytest.raises(DataError, match="No such file"):
        spec.model_copy(update={"mix": folder / "nothing"}).make(cfg, folder / "x")
    (folder / "other").mkdir()
    write_jsonl(folder / "other" / "train.jsonl", [{"prompt": "p", "answer": "a"}])  # of a rewriter
    with pytest.raises(DataError, match=r"train\.jsonl:1: no record for a judge"):
        spec.model_copy(update={"mix": folder / "other"}).make(cfg, folder / "x")


WORLD = World(seed=0, num_people=12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"not json\n", r"train\.jsonl:1: not JSON"),
        (b"\xff\xfe", r"train\.jsonl:1: not UTF-8"),
        (b"\n5\n", r"train\.jsonl:2: a int, must be a JSON object"),
        (b'{"kind": "notes", "text": 5, "labels": "foo"}\n', r"train\.jsonl:1: expected .*labels"),
        (b'{"kind": "notes", "text": "abc", "labels": [[99, "T"]]}\n', r"train\.jsonl:1: expected .*labels"),
        (b'{"kind": "notes", "text": "abc", "labels": [[2, "T"], [2, "F"]]}\n', "above the one before"),
        (b'{"kind": "notes", "text": "abc", "labels": [[2, " "]]}\n', r"train\.jsonl:1: expected .*labels"),
        (b'{"kind": "quality", "prompt": "p", "answer": 1}\n', r"train\.jsonl:1: expected"),
        (b"", "holds no prompts"),
    ],
)
def test_a_bad_mix_is_refused_in_one_line(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(text)
    with pytest.raises(DataError, match=message) as raised:
        read_mix(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_last_line_without_an_end_is_mixed_in(tmp_path: Path) -> None:
    first, last = ({"prompt": letter, "answer": "1", "kind": "quality"} for letter in "ab")
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(last))
    assert read_mix(tmp_path) == ([first, last], [first, last])
    assert read_mix(None) == ([], [])
