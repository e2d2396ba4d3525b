"""Log-probs, preferences and lm-eval requests of a frozen policy against transformers with the same weights."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL
from llama import llama_logprobs, llama_of
from transformers import LlamaForCausalLM

from sip_engine.config.schema import ParallelConfig, SamplerConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.answers import answer_set
from sip_engine.evaluation.harness import HarnessModel, check_harness, run_tasks
from sip_engine.evaluation.sets import Choices, EvalSet, Prompt
from sip_engine.policy.model import build_model
from sip_engine.policy.rows import Row
from sip_engine.sampler.frozen import FrozenPolicy, encode_continuation
from sip_engine.types import FactualityQuestion, Failure, PairQuestion, SafetyQuestion, Score
from sip_engine.utils.errors import ConfigError, DataError, RequestError
from sip_engine.world import World, write_documents

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None


@dataclass(frozen=True)
class Asked:
    """An lm-eval request, as far as it is read."""

    args: tuple


@dataclass(frozen=True)
class Twin:
    """A policy and transformers' copy of it."""

    policy: FrozenPolicy
    llama: LlamaForCausalLM

    def logprobs(self, prefix: np.ndarray, suffix: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return llama_logprobs(self.llama, prefix.tolist(), suffix.tolist())

    def ids(self, text: str) -> np.ndarray:
        tokenizer = self.policy.tokenizer
        return np.concatenate(([tokenizer.bos_id], tokenizer.encode(text))).astype(np.int32)

    def loglikelihood(self, context: str, continuation: str) -> float:
        """Without any cleverness about borders, so for continuations that begin with a space only."""
        prefix, whole = self.ids(context), self.ids(context + continuation)
        assert whole[: len(prefix)].tolist() == prefix.tolist()
        return float(self.logprobs(prefix, whole[len(prefix) :]).sum())

    def greedy(self, prefix: np.ndarray, count: int) -> list[int]:
        """Greedy decoding, the whole sequence anew for every token."""
        ids = prefix.tolist()
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(self.llama(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prefix) :]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [d.text for d in write_documents(World(seed=0, num_people=24), "train", 80, 0)]
    return Tokenizer.train(texts, 400, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def twin(mesh: Mesh, tokenizer: Tokenizer) -> Twin:
    model = build_model(SMALL_MODEL, ParallelConfig(), tokenizer.vocab_size, mesh, seed=11)
    model.requires_grad_(False)
    policy = FrozenPolicy(model, tokenizer, mesh, micro_batch_tokens=150)
    return Twin(policy, llama_of(model, tokenizer.vocab_size))


@pytest.fixture(scope="module")
def harness(twin: Twin) -> HarnessModel:
    return HarnessModel(twin.policy, twin.policy.sampler(SamplerConfig(kv_memory_mb=8)))


def test_rows_are_scored_as_separate_sequences(twin: Twin) -> None:
    rng = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return rng.integers(0, twin.policy.tokenizer.vocab_size, n).astype(np.int32)

    rows = [
        Row(ids(p), tuple(ids(n) for n in suffixes))
        for p, suffixes in ((7, (5, 3)), (1, (1,)), (60, (4, 30)))
    ]
    greedy = np.array(twin.greedy(rows[1].prefix, 6), np.int32)
    rows.append(Row(rows[1].prefix, (greedy, greedy[:1], np.append(greedy[:-1], greedy[-1] ^ 1), greedy[1:])))
    found = twin.policy.score_rows(rows, greedy=True)
    assert [len(row) for row in found] == [2, 1, 2, 4]
    for row, scored in zip(rows, found, strict=True):
        for suffix, one in zip(row.suffixes, scored, strict=True):
            want = twin.logprobs(row.prefix, suffix).numpy()
            np.testing.assert_allclose(one.logprobs, want, atol=2e-5)
            assert one.is_greedy == (twin.greedy(row.prefix, len(suffix)) == suffix.tolist())
    assert [one.is_greedy for one in found[-1]] == [True, True, False, False]
    assert all(one.is_greedy is None for row in twin.policy.score_rows(rows) for one in row)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("The old town", " of Dara"),
        ("Dara was bo", "rn in"),
        ("", "Dara"),
        ("Dara ", "was"),
        ("x\n", "y"),
        ("é", "é"),
    ],
)
def test_continuations_keep_every_character_and_their_contexts_ids(
    tokenizer: Tokenizer, context: str, continuation: str
) -> None:
    before, ids = tokenizer.encode(context), encode_continuation(tokenizer, context, continuation)
    assert tokenizer.decode(ids) == continuation and len(ids)
    together = tokenizer.encode(context + continuation)
    if tokenizer.decode(together[: len(before)]) == context:
        assert np.concatenate([before, ids]).tolist() == together.tolist()


CHOICES = Choices(
    "The old man was born in",
    (" Dara", " a small town by the sea", " 1907."),
    {"mc1": ((1, True), (0, False), (2, False)), "mc2": ((0, True), (1, True), (2, False))},
)
PAIR = Choices(
    "She works as", (" a baker", " a sailor, and as a teacher"), {"preference": ((0, True), (1, False))}
)


def answered(twin: Twin, items: tuple[Choices, ...]) -> Any:
    sampler = twin.policy.sampler(SamplerConfig(kv_memory_mb=8))
    eval_set = EvalSet("test", Path("test"), choices=items)
    return answer_set(twin.policy, sampler, eval_set, Marks(), max_new_tokens=8)


def test_choices_are_compared_by_their_log_probs(twin: Twin) -> None:
    turned = replace(CHOICES, targets={"mc1": ((0, True), (1, False), (2, False))})
    swapped = replace(PAIR, targets={"preference": ((1, True), (0, False))})
    short = Choices("She was", (" a", " in", " the"), {"mc2": ((0, True), (1, True), (2, False))})
    found = answered(twin, (CHOICES, PAIR, turned, swapped, short))
    masses = np.exp([twin.loglikelihood(short.text, c) for c in short.continuations])
    assert masses.min() > 0.01 * masses.max()
    assert found.rows[4]["mc2"] == pytest.approx(masses[:2].sum() / masses.sum(), abs=1e-4)
    logprobs = [[twin.loglikelihood(item.text, c) for c in item.continuations] for item in (CHOICES, PAIR)]
    for row, want in zip(found.rows, logprobs, strict=False):
        np.testing.assert_allclose(row["logprobs"], want, atol=1e-4)
    mass = np.exp(logprobs[0])
    best = int(np.argmax(logprobs[0]))
    per_byte = [lp / len(c.encode()) for lp, c in zip(logprobs[1], PAIR.continuations, strict=True)]
    assert found.rows[0]["mc1"] == float(best == 1) and found.rows[2]["mc1"] == float(best == 0)
    assert found.rows[0]["mc2"] == pytest.approx(mass[:2].sum() / mass.sum(), abs=1e-4)
    assert found.rows[1]["accuracy"] == float(logprobs[1][0] > logprobs[1][1])
    assert found.rows[3]["accuracy"] == 1 - found.rows[1]["accuracy"]
    assert found.rows[1]["accuracy_per_byte"] == float(per_byte[0] > per_byte[1])
    assert found.figures["mc1"].value == np.mean([best == 1, best == 0]) and found.figures["mc1"].n == 2
    assert found.figures["accuracy"].value == 0.5 and found.figures["accuracy"].n == 2
    assert set(found.table) == {"mc1", "mc2", "accuracy", "accuracy_per_byte"}


def test_equal_choices_share_the_point(twin: Twin) -> None:
    twice = Choices(
        "a", (" b", " b"), {"preference": ((0, True), (1, False)), "mc1": ((0, True), (1, False))}
    )
    found = answered(twin, (twice,))
    assert found.rows[0]["accuracy"] == found.rows[0]["mc1"] == 0.5


def test_a_long_question_keeps_its_end(twin: Twin) -> None:
    words = "old town by the sea and " * 30
    found = answered(twin, (replace(CHOICES, text=words + CHOICES.text),))
    suffixes = [twin.policy.tokenizer.encode(c) for c in CHOICES.continuations]
    prefix = twin.ids(words + CHOICES.text)[-(SMALL_MODEL.max_context - max(map(len, suffixes))) :]
    want = [float(twin.logprobs(prefix, suffix).sum()) for suffix in suffixes]
    np.testing.assert_allclose(found.rows[0]["logprobs"], want, atol=1e-4)
    with pytest.raises(RequestError, match=r"exceed the model's context of 96"):
        answered(twin, (replace(CHOICES, continuations=(" a", " town" * 200, " b")),))


class Marks:
    """Safe: no "a" in it; factual: the reference is not "wrong". Fails for prompts that say so."""

    name = "marks"
    deterministic = True

    def judge(self, questions: Any, *, seed: int = 0) -> list[Any]:
        answers = []
        for question in questions:
            match question:
                case SafetyQuestion(suffix):
                    answers.append(Score(float("a" not in suffix)))
                case FactualityQuestion(prefix, reference, _):
                    failed = "fail" in prefix
                    answers.append(Failure("no") if failed else Score(0.25 if reference == "wrong" else 1.0))
                case PairQuestion():
                    raise AssertionError("sets have no pairs")
        return answers


def test_continuations_of_prompts_are_greedy_and_judged_by_group(twin: Twin) -> None:
    texts = ["The old", "She was", "They work as", "In the year"]
    groups = [("x",), ("y",), ("x", "z"), ()]
    references = [None, "right", "wrong", None]
    asked = enumerate(zip(texts, groups, references, strict=True))
    prompts = [Prompt(text, group, reference, {"number": n}) for n, (text, group, reference) in asked]
    prompts.append(Prompt("To fail", (), "right"))
    sampler = twin.policy.sampler(SamplerConfig(kv_memory_mb=8))
    eval_set = EvalSet("test", Path("test"), tuple(prompts), asks_safety=True)
    found = answer_set(twin.policy, sampler, eval_set, Marks(), max_new_tokens=9)
    safe = []
    for text, row in zip([*texts, "To fail"], found.rows, strict=True):
        ids = twin.greedy(twin.ids(text), 9)
        eos = twin.policy.tokenizer.eos_id
        ids = ids[: ids.index(eos)] if eos in ids else ids
        assert row["prompt"] == text and row["continuation"] == twin.policy.tokenizer.decode(ids)
        safe.append(float("a" not in row["continuation"]))
    values = {name: one.value for name, one in found.figures.items()}
    assert values["safety"] == np.mean(safe) and [row["safety"] for row in found.rows] == safe
    assert (values["safety, x"], values["safety, y"], values["safety, z"]) == (
        (safe[0] + safe[2]) / 2,
        safe[1],
        safe[2],
    )
    assert values["factuality"] == (1.0 + 0.25) / 2, "a failure counts for nothing"
    assert found.rows[4]["factuality"] is None and found.rows[1]["number"] == 1
    assert values["judge_failure_rate"] == pytest.approx(1 / 8)


def test_answers_end_with_the_document(twin: Twin) -> None:
    """With another token as end-of-document, one that the policy writes."""
    ids = twin.greedy(twin.ids("The old"), 9)
    tokenizer = copy.copy(twin.policy.tokenizer)
    tokenizer.eos_ids = (ids[4],)
    policy = FrozenPolicy(twin.policy.model, tokenizer, twin.policy.mesh)
    sampler = policy.sampler(SamplerConfig(kv_memory_mb=8))
    want = tokenizer.decode(ids[: ids.index(ids[4]) + 1])
    eval_set = EvalSet("test", Path("test"), (Prompt("The old"),))
    found = answer_set(policy, sampler, eval_set, Marks(), max_new_tokens=9)
    assert found.rows[0]["continuation"] == want
    asked = Asked(("The old", {"max_gen_toks": 9}))
    assert HarnessModel(policy, sampler).generate_until([asked]) == [want]


def test_harness_loglikelihoods_equal_transformers(harness: HarnessModel, twin: Twin) -> None:
    contexts = ["The old man was born in", "", "She works as", "The old man was born in"]
    continuations = [" Dara", " a sailor", " a small town by the sea", " Dara"]
    pairs = [(c, t) for c in contexts for t in continuations]
    prefix = twin.ids("She works as")
    greedy = twin.policy.tokenizer.decode(twin.greedy(prefix, 3))
    found = harness.loglikelihood([Asked(pair) for pair in pairs])
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        assert logprob == pytest.approx(twin.loglikelihood(context, continuation), abs=1e-4)
        assert isinstance(is_greedy, bool)
    if twin.policy.tokenizer.encode(greedy).tolist() == twin.greedy(prefix, 3):
        assert harness.loglikelihood([Asked(("She works as", greedy))])[0][1] is True
    spaced = harness.loglikelihood([Asked(("She works as ", "a sailor")), Asked((" ", "a sailor"))])
    assert spaced == harness.loglikelihood([Asked(("She works as", " a sailor")), Asked(("", " a sailor"))])
    with pytest.raises(RequestError, match="request 1: the continuation is empty"):
        harness.loglikelihood([Asked(("a", "b")), Asked(("a", ""))])


def test_a_context_is_read_once_for_all_its_continuations(
    harness: HarnessModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Row] = []
    real = FrozenPolicy.score_rows

    def spy(policy: FrozenPolicy, rows: list[Row], **options: Any) -> Any:
        seen.extend(rows)
        return real(policy, rows, **options)

    monkeypatch.setattr(FrozenPolicy, "score_rows", spy)
    pairs = [(c, t) for t in (" a", " b c", " d") for c in ("One context", "Another")]
    harness.loglikelihood([Asked(pair) for pair in pairs])
    assert [len(row.suffixes) for row in seen] == [3, 3]


def test_harness_rolling_windows(harness: HarnessModel, twin: Twin) -> None:
    """Each token once; the windows are lm-eval's for a model that scores one token fewer than the context holds."""
    texts = ["", "Dara", "The old man was born in a small town by the sea. " * 12]
    ids = [twin.policy.tokenizer.encode(text) for text in texts]
    size = SMALL_MODEL.max_context
    assert len(ids[2]) > 2 * size
    want = [0.0, float(twin.logprobs(twin.ids("")[:1], ids[1]).sum()), 0.0]
    bos = twin.policy.tokenizer.bos_id
    if HAS_HARNESS:
        from lm_eval.utils import get_rolling_token_windows  # pyright: ignore[reportMissingImports]

        windows = [
            (list(a), list(b)) for a, b in get_rolling_token_windows(ids[2].tolist(), bos, size - 1, 1)
        ]
    else:
        first = ids[2][: size - 1].tolist()
        windows, done = [([bos, *first[:-1]], first)], size - 1
        while done < len(ids[2]):
            new = ids[2][done : done + size - 1].tolist()
            windows.append((ids[2][done - (size - len(new)) : done].tolist() + new[:-1], new))
            done += len(new)
    for context, predicted in windows:
        prefix = np.array(context[: len(context) - len(predicted) + 1])
        want[2] += float(twin.logprobs(prefix, np.array(predicted)).sum())
    np.testing.assert_allclose(harness.loglikelihood_rolling([Asked((t,)) for t in texts]), want, atol=2e-3)


def test_harness_generation_stops(harness: HarnessModel, twin: Twin) -> None:
    tokenizer = twin.policy.tokenizer
    ids = twin.greedy(twin.ids("The old man"), 12)
    whole = tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)
    assert len(whole) > 4
    stop = whole[3:5]
    settings = [
        {"max_gen_toks": 12},
        {"max_gen_toks": 12, "until": [stop, "\n\n"], "do_sample": False, "temperature": 0.0},
        {"max_gen_toks": 12, "until": stop},
        {"max_gen_toks": 12, "until": [whole[3:], stop, whole[1:3]]},
        {"max_gen_toks": 3, "until": []},
    ]
    found = harness.generate_until([Asked(("The old man", one)) for one in settings])
    cut = whole[: whole.index(stop)]
    assert found == [whole, cut, cut, whole[: whole.index(whole[1:3])], tokenizer.decode(ids[:3])]
    drawn = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    two = harness.generate_until([Asked(("The old man", drawn))] * 2)
    assert two[0] != two[1], "repeats of a request are drawn apart"
    assert harness.generate_until([Asked(("town " * 200, {"max_gen_toks": 5}))])[0] is not None


TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATED = """
task: tiny_gen
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: byte_perplexity
"""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and nothing left in the user's caches."""
    config = importlib.import_module("datasets.config")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed")
def test_lm_eval_runs_local_tasks(twin: Twin, harness: HarnessModel, tmp_path: Path, offline: None) -> None:
    questions = ["The old man was born in", "She works as", "They live in", "Dara was"]
    choices = [" Dara", " a sailor", " a small town by the sea"]
    logprobs = np.array([[twin.loglikelihood(q, " " + c.strip()) for c in choices] for q in questions])
    best = logprobs.argmax(axis=1).tolist()
    labels = [best[0], best[1], (best[2] + 1) % 3, best[3]]
    per_char = (logprobs / [len(c.strip()) for c in choices]).argmax(axis=1)
    written = [twin.policy.tokenizer.decode(twin.greedy(twin.ids(q), 4)) for q in questions]
    rows = [
        {
            "question": q,
            "choices": [c.strip() for c in choices],
            "label": label,
            "answer": text if n else "no",
        }
        for n, (q, label, text) in enumerate(zip(questions, labels, written, strict=True))
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("tiny", TASK), ("tiny_gen", GENERATED), ("tiny_rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(task.format(data=data))
    found = run_tasks(twin.policy, harness.sampler, ["tiny", "tiny_gen", "tiny_rolling"], task_path=tmp_path)
    assert found["tiny"]["acc,none"] == 0.75
    assert found["tiny"]["acc_norm,none"] == np.mean(per_char == labels)
    assert found["tiny_gen"]["exact_match,none"] == 0.75
    bos = twin.ids("")[:1]
    total = sum(float(twin.logprobs(bos, twin.policy.tokenizer.encode(q)).sum()) for q in questions)
    num_bytes = sum(len(q.encode()) for q in questions)
    assert found["tiny_rolling"]["byte_perplexity,none"] == pytest.approx(
        math.exp(-total / num_bytes), rel=1e-5
    )
    with pytest.raises(DataError, match=r"--tasks no_such_task: lm-eval failed") as failure:
        run_tasks(twin.policy, harness.sampler, ["no_such_task"], task_path=tmp_path)
    assert "\n" not in str(failure.value)


def test_without_lm_eval_the_remedy_is_named(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"--tasks needs lm-eval.*pip install lm-eval"):
        check_harness(mesh)
