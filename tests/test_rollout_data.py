"""Prompts made of a policy's own rollouts: labels are the labeller's, texts the sampler's, and the mix is whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from sip_engine.config import RunConfig, parse_config
from sip_engine.corpus import open_corpus
from sip_engine.data.prompts import read_prompts
from sip_engine.errors import ConfigError, DataError
from sip_engine.files import write_jsonl
from sip_engine.generate import load_policy
from sip_engine.judges.compact import compact_prompt, notes_prompt
from sip_engine.judges.fences import neutral
from sip_engine.lessons import make_lessons
from sip_engine.mesh import Mesh
from sip_engine.rollout_data import make_rollout_data, rollout_records
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.train import train
from sip_engine.types import Failure, Judgment, PairQuestion, SafetyQuestion, Sample, Score
from sip_engine.world import World, measure
from sip_engine.world.measure import Note
from sip_engine.world.parse import SENTENCE


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


def test_a_mix_without_exercises_is_told_from_another_folder(tmp_path: Path) -> None:
    world = {"out": tmp_path / "run", "init": tmp_path / "base", "world": {}, "judge": {"backend": "world"}}
    cfg, settings = parse_config(world, "test"), KEPT | {"num_notes": 4}
    (tmp_path / "mix").mkdir()
    with pytest.raises(DataError, match="takes a folder that"):
        make_rollout_data(cfg, tmp_path / "x", **settings, mix=tmp_path / "mix")
    write_jsonl(tmp_path / "mix" / "train.jsonl", [{"prompt": "p", "answer": "1", "kind": "quality"}])
    with pytest.raises(DataError, match=r"warm\.jsonl: .* no exercises .* --flaws"):
        make_rollout_data(cfg, tmp_path / "x", **settings, mix=tmp_path / "mix")


@pytest.mark.slow
def test_files_hold_the_policys_rollouts_and_the_mix(mesh: Mesh, tmp_path: Path) -> None:
    settings = {
        "out": tmp_path / "base",
        "steps": 1,
        "batch_size": 2,
        "world": {"num_people": 12, "train_documents": 150, "test_documents": 60},
        "data": {"suffix_tokens": 20, "max_prefix_tokens": 40, "min_prefix_tokens": 8, "vocab_size": 500},
        "model": {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 64}
        | {"max_context": 96},
        "objective": {"kind": "next_token"},
        "judge": {"backend": "world"},
        "eval": {"num_prefixes": 8, "generate": False, "every": 0},
    }
    settings["data"]["cache"] = tmp_path / "cache"
    train(parse_config(settings, "test"), mesh)
    mixed = tmp_path / "mix"
    for name in ("warm", "eval"):
        write_jsonl(
            mixed / f"{name}.jsonl", [{"prompt": f"q{n}", "answer": "1", "kind": "quality"} for n in range(9)]
        )
    cfg = parse_config(settings | {"out": tmp_path / "data", "init": tmp_path / "base", "seed": 3}, "test")
    make_rollout_data(
        cfg,
        tmp_path / "data",
        num_pairs=6,
        num_safety=0,
        num_factuality=0,
        num_notes=40,
        num_grades=30,
        num_eval=4,
        mix=mixed,
        mix_num=5,
        max_prefix_chars=None,
    )
    lines = {
        n: (tmp_path / "data" / f"{n}.jsonl").read_text().splitlines() for n in ("train", "warm", "eval")
    }
    warm = [json.loads(line) for line in lines["warm"]]
    kinds = Counter(record["kind"] for record in warm)
    assert kinds["flaw"] == 70 and kinds["quality"] == 5 and kinds["rollouts"] <= 12
    assert [line for line in lines["warm"] if json.loads(line)["kind"] != "flaw"] == lines["train"]
    policy = load_policy(tmp_path / "base")
    samples = read_prompts(
        tmp_path / "data" / "warm.jsonl", policy.tokenizer, max_prompt_tokens=400, max_answer_tokens=9
    )
    assert len(samples) == len(warm)
    # The first prefix' rollouts again, by the sampler itself.
    judged = parse_config(
        cfg.model_dump(mode="json") | {"world": settings["world"] | {"split": "judge"}}, "test"
    )
    (first,) = open_corpus(judged, mesh, policy.tokenizer).stream.samples_at(0, 1)
    (done,) = policy.sampler(cfg.sampler).generate(
        [Request(first.prefix_ids, 4, first.document, first.cut)],
        SamplingParams(len(first.suffix_ids), seed=3),
    )
    found = {r["prompt"]: r["answer"] for r in warm if r["kind"] == "flaw"}
    world, texts = World(seed=0, num_people=12), [policy.tokenizer.decode(one.ids) for one in done]
    measures = [measure(world, first.prefix, text) for text in texts]
    grades = [str(min(9, int(10 * one.quality))) for one in measures]
    for text, one, grade in zip(texts, measures, grades, strict=True):
        assert found[notes_prompt(first.prefix, text)] == one.notes + grade
    for n in (0, 2):
        before, both = f"\x01{neutral(first.prefix)}\x02{neutral(texts[n])}\x03", neutral(texts[n + 1])
        assert found[before] == grades[n] and found[f"{before}{both}\x08"] == grades[n + 1]
        assert compact_prompt(PairQuestion(first.prefix, texts[n], texts[n + 1])) == f"{before}{both}\x04"
    _check_lessons(cfg, tmp_path)
    with pytest.raises(DataError, match="no such file"):
        make_rollout_data(cfg, tmp_path / "x", **KEPT, mix=tmp_path / "nothing")
    with pytest.raises(ConfigError, match="set init"):
        make_rollout_data(cfg.model_copy(update={"init": None}), tmp_path / "x", **KEPT, mix=None)
    assert not (tmp_path / "x").exists()


def _check_lessons(cfg: RunConfig, folder: Path) -> None:
    """Each prompt's answer is the world's note on its sentence, and no answer is more than a fifth of them."""
    make_lessons(cfg, folder / "lessons", num=100, num_eval=10, max_sentences=4)
    world = World(seed=0, num_people=12)
    for name, most in (("train", 100), ("eval", 10)):
        lines = (folder / "lessons" / f"{name}.jsonl").read_text().splitlines()
        records, counts = [json.loads(line) for line in lines], Counter()
        for record in records:
            context, sentence = record["prompt"].removeprefix("\x01").removesuffix("\x0f").split("\x02")
            assert measure(world, context, sentence).notes == record["answer"]
            assert record["kind"] == f"lesson_{Note(record['answer']).name.lower()}"
            assert len(SENTENCE.findall(context)) <= 4
            counts[record["answer"]] += 1
        assert most // 5 == max(counts.values()) <= len(records) <= most  # so young a policy is malformed
    with pytest.raises(ConfigError, match="set init"):
        settings = {"num": 9, "num_eval": 2, "max_sentences": 3}
        make_lessons(cfg.model_copy(update={"init": None}), folder / "x", **settings)
    with pytest.raises(ConfigError, match=r"add \[world\]"):
        make_lessons(cfg.model_copy(update={"world": None}), folder / "x", **settings)


KEPT = {
    "num_pairs": 2,
    "num_safety": 0,
    "num_factuality": 0,
    "num_notes": 0,
    "num_grades": 0,
    "num_eval": 4,
    "mix_num": None,
    "max_prefix_chars": None,
}
