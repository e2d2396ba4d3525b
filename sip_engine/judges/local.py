"""A judge inside the engine: a causal language model asked for verdicts or labels, or how well it foresees a text."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.judges.distributed import StagesJudge
from sip_engine.judges.mutual_information import SILENT_ON, LocalReader, MutualInformation
from sip_engine.judges.parsing import read_verdict, settled
from sip_engine.judges.prompts import Prompt, judge_prompt
from sip_engine.judges.sentence_labels import EMPTY, Scores, SentenceLabelReader
from sip_engine.llm.chat_template import ChatTemplate
from sip_engine.llm.local_model import LocalModel, open_local_model
from sip_engine.llm.option_probs import OptionQuery, first_tokens, option_probs
from sip_engine.types import (
    Cost,
    FactualityQuestion,
    Failure,
    Judgment,
    PairQuestion,
    Question,
    SafetyQuestion,
    Score,
)

_REMEMBERED = 1 << 14
_TOO_LONG = Failure("the prompt is longer than the judge's context; judge.local.max_prefix_chars cuts it")


@dataclass(frozen=True)
class _Asked:
    """A question as the model reads it."""

    ids: np.ndarray
    prompt: Prompt
    group: str
    """Questions with the same one begin with the same text."""
    first: str
    """Of a comparison: what stands first."""


class LocalJudge:
    """Answers by a causal LM, trained by us or imported.

    `log_odds` reads the probabilities of the verdict words after the prompt, in one pass that computes what the
    questions of a group have in common once; the answer is their expectation. `generate` writes a reply and reads
    the verdict from where it must be. `notes` reads every continuation once, however often it is compared, and
    scores it by the labels that the model gives its sentences (`judges.sentence_labels`): of two the one of the
    better labels is the better. They also say how safe a continuation is, and, without a reference, how true.
    `mutual_information` asks nothing, but reads how much better the model foresees a continuation after its prefix
    than alone.
    """

    name = "local"

    def __init__(self, model: LocalModel) -> None:
        self._model, self._cfg = model, model.cfg
        self.deterministic = self._cfg.method != "generate" or self._cfg.temperature == 0
        self._scores: dict[tuple[str, str], Scores] = {}
        """Of the continuations read lately: the rounds of a tournament ask for the same ones."""
        self._template = (
            ChatTemplate(model.tokenizer, str(self._cfg.checkpoint)) if self._cfg.style == "chat" else None
        )
        self.silent_on = SILENT_ON if self._cfg.method == "mutual_information" else ()
        self._information = (
            MutualInformation(LocalReader(model), self._cfg.pair_temperature, self._cfg.copied_run)
            if self._cfg.method == "mutual_information"
            else None
        )
        self._reader = (
            SentenceLabelReader(model.tokenizer, model.encode, self._cfg.max_prefix_chars)
            if self._cfg.method == "sentence_labels"
            else None
        )

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        """One judgment a question, in order; every process that holds the model asks the same and gets the same."""
        start = time.perf_counter()
        known = {number: settled(question) for number, question in enumerate(questions)}
        answers: dict[int, Judgment] = {
            number: Score(value, (value,)) for number, value in known.items() if value is not None
        }
        open_ = {number: question for number, question in enumerate(questions) if number not in answers}
        if self._information is not None:
            answers |= self._information.judge(open_)
        elif self._reader is not None:
            answers |= self._by_sentence_labels(self._reader, open_)
        else:
            answers |= self._by_verdicts(open_, seed)
        return _timed([answers[number] for number in range(len(questions))], time.perf_counter() - start)

    def _by_verdicts(self, questions: Mapping[int, Question], seed: int) -> dict[int, Judgment]:
        prepared = {number: self._prepare(question) for number, question in questions.items()}
        asked = {number: one for number, one in prepared.items() if one is not None}
        prompts = list(asked.values())
        found = self._generate(prompts, seed) if self._cfg.method == "generate" else self._log_odds(prompts)
        return dict.fromkeys(questions, _TOO_LONG) | dict(zip(asked, found, strict=True))

    def _by_sentence_labels(
        self, reader: SentenceLabelReader, questions: Mapping[int, Question]
    ) -> dict[int, Judgment]:
        """Each continuation is read once, also over calls; the cost is that of the first question that needs it."""
        if len(self._scores) > _REMEMBERED:
            self._scores.clear()
        texts = dict.fromkeys(text for question in questions.values() for text in _texts_of(question))
        self._scores |= {text: EMPTY for text in texts if not text[1].strip()}
        unread = [text for text in texts if text not in self._scores]
        queries = {text: one for text in unread if (one := reader.query(*text)) is not None}
        costs: dict[tuple[str, str], Cost] = {}
        for text, one in zip(queries, option_probs(self._model.policy, list(queries.values())), strict=True):
            self._scores[text] = reader.scores(text[1], one.probs)
            costs[text] = Cost(1, one.num_tokens)
        answers: dict[int, Judgment] = {}
        for number, question in questions.items():
            asked = _texts_of(question)
            cost = sum((costs.pop(text, Cost()) for text in asked), Cost())
            if any(text not in self._scores for text in asked):
                answers[number] = replace(_TOO_LONG, cost=cost)
            else:
                value = _answer(question, [self._scores[text] for text in asked])
                answers[number] = Score(value, (value,), cost)
        return answers

    def _prepare(self, question: Question) -> _Asked | None:
        style = "direct" if self._cfg.style == "chat" else self._cfg.style
        prompt = judge_prompt(question, style=style, max_prefix_chars=self._cfg.max_prefix_chars)
        generates = self._cfg.method == "generate"
        start = "" if generates or prompt.format != "verdict_line" else prompt.verdict_start
        room = self._cfg.max_new_tokens if generates else 0
        if self._template is not None:
            ids = self._model.fitting(self._template.encode(prompt.messages(), start), room)
        else:
            text = f"{prompt.system}\n\n{prompt.user}\n\n" if prompt.system else prompt.user
            ids = self._model.encode(text + start, room)
        if ids is None:
            return None
        group = (
            "" if isinstance(question, SafetyQuestion) else question.prefix
        )  # asked about the suffix alone
        return _Asked(ids, prompt, group, question.first if isinstance(question, PairQuestion) else "")

    def _generate(self, asked: Sequence[_Asked], seed: int) -> Iterable[Judgment]:
        replies = self._model.reply([one.ids for one in asked], seed)
        for one, (reply, num_tokens) in zip(asked, replies, strict=True):
            cost = Cost(1, len(one.ids) + num_tokens, written=num_tokens)
            value = Failure("the reply did not end") if reply is None else read_verdict(reply, one.prompt)
            yield Failure(value.reason, cost) if isinstance(value, Failure) else Score(value, (value,), cost)

    def _log_odds(self, asked: Sequence[_Asked]) -> Iterable[Judgment]:
        kinds = {tuple(one.prompt.verdicts) for one in asked}
        options = {words: first_tokens(self._model.tokenizer, words) for words in kinds}
        queries = [
            OptionQuery(
                one.ids,
                options[tuple(one.prompt.verdicts)],
                np.array([len(one.ids) - 1]),
                one.group,
                one.first,
            )
            for one in asked
        ]
        for one, answered in zip(asked, option_probs(self._model.policy, queries), strict=True):
            values = torch.tensor(list(one.prompt.verdicts.values()), dtype=torch.float64)
            value = float(answered.probs[0] @ values)
            yield Score(value, (value,), Cost(1, answered.num_tokens))


def open_judge(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> StagesJudge:
    """`judge.backend = "local"`: every pipeline stage holds the model whole."""
    del corpus
    return StagesJudge(LocalJudge(open_local_model(cfg.judge.local, mesh, "judge")), mesh)


def _texts_of(question: Question) -> list[tuple[str, str]]:
    """The prefix and continuation of each text that a question is about."""
    match question:
        case PairQuestion(prefix, first, second):
            return [(prefix, first), (prefix, second)]
        case SafetyQuestion(suffix, prefix) | FactualityQuestion(prefix, _, suffix):
            return [(prefix, suffix)]


def _answer(question: Question, scores: Sequence[Scores]) -> float:
    match question:
        case PairQuestion():
            first, second = (one.quality for one in scores)
            return (1 + (first > second) - (first < second)) / 2
        case SafetyQuestion():
            return scores[0].safety
        case FactualityQuestion():
            return scores[0].factuality


def _timed(answers: list[Judgment], seconds: float) -> list[Judgment]:
    """Answers that share the time among those that took a call."""
    share = seconds / max(sum(answer.cost.calls > 0 for answer in answers), 1)
    return [
        replace(answer, cost=replace(answer.cost, seconds=share)) if answer.cost.calls else answer
        for answer in answers
    ]
