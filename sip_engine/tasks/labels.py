"""Prompts with known answers for judge and rewriter, made from documents (method §judge and rewriter training)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np

from sip_engine.data.tokenizer import Tokenizer
from sip_engine.judges.rewards import ask_votes
from sip_engine.llm.compact_prompts import compact_prompt, rewrite_prompt
from sip_engine.tasks.corruptors.rules import Corruption, Corruptor
from sip_engine.types import (
    FactualityQuestion,
    Failure,
    Judge,
    Judgment,
    PairQuestion,
    Question,
    Rewriter,
    RewriteRequest,
    SafetyQuestion,
    Sample,
)

Record = dict[str, Any]
_NO_COPY = Corruption("", "")
_ANSWERS: dict[str, Mapping[float, str]] = {
    "safety": {1.0: "yes", 0.0: "no"},
    "factuality": {1.0: "none", 0.5: "possible", 0.0: "definite"},
}
_LABEL_BATCH = 4096
_Q = TypeVar("_Q", bound=Question)
LABEL_VOTES = 8
"""Votes on a label, which must agree (method §judge training)."""


def judge_records(
    samples: Sequence[Sample],
    corruptor: Corruptor,
    labeller: Judge,
    tokenizer: Tokenizer,
    *,
    num_pairs: int,
    num_safety: int,
    num_factuality: int = 0,
    max_prefix_chars: int | None,
    seed: int,
) -> list[Record]:
    """At most `num_pairs` suffixes against their corrupted copies, each in both orders, and so many labels.

    A corrupted copy is cut at the original's number of tokens, so that length says nothing. Labels are those on
    which all votes agree, each answer as often as the others: `num_safety` of suffixes alone, `num_factuality` of
    suffixes and corrupted copies beside the original. Shuffled by `seed`.
    """
    wanted = samples[: max(num_pairs, 2 * num_factuality)]
    requests = [RewriteRequest(s.prefix, s.suffix) for s in wanted]
    worse = [
        _NO_COPY
        if isinstance(copy, Failure)
        else replace(copy, text=cut_text(copy.text, tokenizer, len(s.suffix_ids)))
        for s, copy in zip(wanted, corruptor.corrupt(requests, seed=seed), strict=True)
    ]
    records = list(_pairs(wanted[:num_pairs], worse[:num_pairs], max_prefix_chars))
    records += _safety(samples, labeller, num_safety)
    records += _factuality(wanted, worse, labeller, num_factuality, max_prefix_chars)
    return shuffled(records, seed)


def rewrite_records(
    samples: Sequence[Sample],
    labeller: Judge,
    teacher: Rewriter,
    tokenizer: Tokenizer,
    *,
    num: int,
    seed: int,
) -> list[Record]:
    """At most `num` rewrite prompts, half of them of safe suffixes, whose answer is the suffix itself.

    The answer of an unsafe one is the teacher's rewrite, for a warm start by next-token training; where that fails
    the suffix is left out. Shuffled by `seed`.
    """
    by_label: dict[bool, list[Sample]] = {True: [], False: []}
    labels = labels_of(labeller, [SafetyQuestion(s.suffix, s.prefix) for s in samples])
    for sample, (_, label) in zip(samples, labels, strict=True):
        if label in (0.0, 1.0):
            by_label[label == 1.0].append(sample)
    each = min(num // 2, len(by_label[True]), len(by_label[False]))
    unsafe = [RewriteRequest(s.prefix, s.suffix) for s in by_label[False][:each]]
    answers = [s.suffix for s in by_label[True][:each]]
    answers += [a if isinstance(a, str) else "" for a in teacher.rewrite(unsafe, seed=seed)]
    records = []
    for number, (s, answer) in enumerate(
        zip(by_label[True][:each] + by_label[False][:each], answers, strict=True)
    ):
        fitted = cut_text(answer, tokenizer, len(s.suffix_ids))
        if fitted:
            prompt = rewrite_prompt(RewriteRequest(s.prefix, s.suffix))
            facts = {"prefix": s.prefix, "suffix": s.suffix, "safe": number < each}
            records.append({"prompt": prompt, "answer": fitted, **facts})
    return shuffled(records, seed)


def _pairs(
    samples: Sequence[Sample], worse: Sequence[Corruption], max_prefix_chars: int | None
) -> Iterator[Record]:
    for s, copy in zip(samples, worse, strict=True):
        if not copy.text or copy.text == s.suffix:
            continue
        for answer, first, second in (("1", s.suffix, copy.text), ("2", copy.text, s.suffix)):
            question = PairQuestion(s.prefix, first, second)
            prompt = compact_prompt(question, max_prefix_chars)
            yield {"prompt": prompt, "answer": answer, "kind": "quality", "corruption": copy.flaw}


def _safety(samples: Sequence[Sample], labeller: Judge, num: int) -> list[Record]:
    questions = [SafetyQuestion(s.suffix, s.prefix) for s in samples] if num else []
    return records_of_labels(questions, labeller, num, "safety", None)


def _factuality(
    samples: Sequence[Sample],
    worse: Sequence[Corruption],
    labeller: Judge,
    num: int,
    max_prefix_chars: int | None,
) -> list[Record]:
    questions = [
        FactualityQuestion(s.prefix, s.suffix, text)
        for s, copy in zip(samples, worse, strict=True)
        for text in (s.suffix, copy.text)
        if text and num
    ]
    return records_of_labels(questions, labeller, num, "factuality", max_prefix_chars)


def records_of_labels(
    questions: Sequence[Question],
    labeller: Judge,
    num: int,
    kind: Literal["safety", "factuality"],
    max_prefix_chars: int | None,
) -> list[Record]:
    """At most `num` questions with the labels that all votes give, each answer equally often."""
    answers = _ANSWERS[kind]
    found: dict[str, list[Question]] = {answer: [] for answer in answers.values()}
    for question, label in labels_of(labeller, questions):
        if label is not None:
            found[answers[label]].append(question)
        if min(map(len, found.values())) >= num // len(answers):
            break
    each = min(num // len(answers), *map(len, found.values()))
    return [
        {"prompt": compact_prompt(question, max_prefix_chars), "answer": answer, "kind": kind}
        for answer, these in found.items()
        for question in these[:each]
    ]


def labels_of(labeller: Judge, questions: Sequence[_Q]) -> Iterator[tuple[_Q, float | None]]:
    """Each question and the answer that all votes gave alike; None where not, and where one failed or was a tie.

    Asked a batch at a time, so that one who has enough can stop. The votes' seeds are always the same, so that a
    text has one label whatever it is asked for.
    """
    for start in range(0, len(questions), _LABEL_BATCH):
        batch = questions[start : start + _LABEL_BATCH]
        for question, votes in zip(
            batch, ask_votes(labeller, batch, [LABEL_VOTES] * len(batch), (0,)), strict=True
        ):
            yield question, _label(question, votes)


def _label(question: Question, votes: Sequence[Judgment]) -> float | None:
    decisions = {None if isinstance(vote, Failure) else _decision(question, vote.value) for vote in votes}
    return decisions.pop() if len(decisions) == 1 else None


def _decision(question: Question, value: float) -> float | None:
    """The answer that a vote comes down to: a judge that reads probabilities gives fractions.

    Of a pair and of safety the likelier one, None for a tie. Factuality between none and all is "possible", however
    near to either: the synthetic world gives the share of the claims that are true.
    """
    if isinstance(question, FactualityQuestion):
        return value if value in (0.0, 1.0) else 0.5
    return None if value == 0.5 else float(value > 0.5)


def cut_text(text: str, tokenizer: Tokenizer, num_tokens: int) -> str:
    """The first tokens of a text, without a character cut in two at the end."""
    return tokenizer.decode(tokenizer.encode(text)[:num_tokens]).rstrip("\ufffd")


def shuffled(records: list[Record], seed: int) -> list[Record]:
    """Records in an order drawn by `seed`."""
    return [records[i] for i in np.random.default_rng(seed).permutation(len(records))]
