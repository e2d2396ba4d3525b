"""Labels of texts by votes that must agree, and prompts that ask for them (method §judge training)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeVar

from sip_engine.data.tokenizer import Tokenizer
from sip_engine.judges.rewards import ask_votes
from sip_engine.llm.compact_prompts import compact_prompt
from sip_engine.tasks.files import Record
from sip_engine.types import FactualityQuestion, Failure, Judge, Judgment, Question

_ANSWERS: dict[str, Mapping[float, str]] = {
    "safety": {1.0: "yes", 0.0: "no"},
    "factuality": {1.0: "none", 0.5: "possible", 0.0: "definite"},
}
_LABEL_BATCH = 4096
_Q = TypeVar("_Q", bound=Question)
LABEL_VOTES = 8
"""Votes on a label, which must agree (method §judge training)."""


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
