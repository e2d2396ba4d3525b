"""A judge from any causal language model: how much better does it foresee a suffix for knowing what came before?

Quality of a suffix s after a prefix p, under the judge model, in nats a token (pointwise mutual information):

    quality = mean over the tokens of s of   log p(token | p, s before it) - log p(token | s before it)

Likelihood alone prefers what is common or repeats itself; the second term takes that out. What copies the prefix it
would prefer to all else, as the prefix foretells its own words best: a token within a run that stands in the prefix
as well earns nothing by it (`copied_run`). Factuality, with the document's own suffix r as a note in front of
everything:

    gain = mean over the tokens of s of   log p(token | r, p, s before it) - log p(token | p, s before it)
    factuality = sigmoid(gain), the odds of a token with the note against without it

above 1/2 for what the original confirms, below for what it speaks against. Nothing is asked in words: the model needs
no instructions, and no text can talk to it. It says nothing of safety. What it is blind to is measured by
`python -m benchmarks mutual_information`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple, Protocol

import numpy as np

from sip_engine.llm.local_model import LocalModel
from sip_engine.policy.packing import split_by_tokens
from sip_engine.policy.rows import Row
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
from sip_engine.utils.copied import copied_tokens

SILENT_ON = (SafetyQuestion,)
"""What mutual information has no answer to."""
_REMEMBERED = 1 << 15
_NOTHING = -math.inf
"""Gain of a continuation without a token."""
_STEP = 64


class Reading(NamedTuple):
    """A suffix to be read after a prefix, and after a note in front of that; either may be empty."""

    note: str
    prefix: str
    suffix: str


@dataclass(frozen=True)
class TokenLogProbs:
    """What was read: its last tokens [n], at least all of the suffix, by any name, with their log-probs [n] in nats.

    NaN where the reader has none, as of a text's first token where nothing stands in front of it.
    """

    tokens: tuple[Hashable, ...]
    logprobs: np.ndarray
    cost: Cost
    context: tuple[Hashable, ...] = ()
    """The tokens before these, where these are not all that was read."""


class Reader(Protocol):
    """A language model that says how probable a given text is."""

    def read(self, readings: Sequence[Reading]) -> list[TokenLogProbs | Failure]:
        """One result a reading, in order."""
        ...


class MutualInformation:
    """Answers questions by a reader. Each suffix is read once alone and once after its prefix, however often it is
    compared; another time with the original in front where factuality is asked for.

    `pair_temperature` T makes a comparison the Bradley-Terry probability sigmoid((quality of the first - of the
    second) / T); at 0 the better one has 1.0. `copied_run`: see `mean_gain`.
    """

    def __init__(self, reader: Reader, pair_temperature: float, copied_run: int) -> None:
        self._reader, self._temperature, self._copied_run = reader, pair_temperature, copied_run
        self._gains: dict[Reading, float] = {}
        """Of what was read lately: quality where the note is empty, else the gain by the note."""

    def judge(self, questions: Mapping[int, Question]) -> dict[int, Judgment]:
        """A judgment of each question; the cost of a reading is that of the first question that needs it."""
        if len(self._gains) > _REMEMBERED:
            self._gains.clear()
        needed = {number: _gains_for(question) for number, question in questions.items()}
        wanted = dict.fromkeys(gain for gains in needed.values() for gain in gains)
        unread = [gain for gain in wanted if gain not in self._gains]
        costs, failures = self._read(unread)
        answers: dict[int, Judgment] = {}
        for number, question in questions.items():
            gains = needed[number]
            cost = sum((costs.pop(gain, Cost()) for gain in gains), Cost())
            lost = next((failures[gain] for gain in gains if gain in failures), None)
            if not gains:
                answers[number] = _no_answer(question)
            elif lost is not None:
                answers[number] = Failure(lost, cost)
            else:
                value = self._answer(question, [self._gains[gain] for gain in gains])
                answers[number] = Score(value, (value,), cost)
        return answers

    def _read(self, unread: Sequence[Reading]) -> tuple[dict[Reading, Cost], dict[Reading, str]]:
        """Fill in the gains of `unread`; what each cost, and why some are missing."""
        self._gains |= {gain: _NOTHING for gain in unread if not gain.suffix}
        parts = {gain: _parts_of(gain) for gain in unread if gain.suffix}
        readings = list(dict.fromkeys(reading for three in parts.values() for reading in three))
        found = dict(zip(readings, self._reader.read(readings) if readings else (), strict=True))
        owed = {reading: one.cost for reading, one in found.items()}
        costs: dict[Reading, Cost] = {}
        failures: dict[Reading, str] = {}
        for gain, three in parts.items():
            costs[gain] = sum((owed.pop(reading, Cost()) for reading in three), Cost())
            alone, before, after = (found[reading] for reading in three)
            # What says the original again is true: that is no copy of the prefix.
            value = mean_gain(alone, before, after, 0 if gain.note else self._copied_run)
            if isinstance(value, Failure):
                failures[gain] = value.reason
            else:
                self._gains[gain] = value
        return costs, failures

    def _answer(self, question: Question, gains: Sequence[float]) -> float:
        if isinstance(question, PairQuestion):
            first, second = gains
            if first == second:
                return 0.5
            return (
                float(first > second)
                if not self._temperature
                else _sigmoid((first - second) / self._temperature)
            )
        return _sigmoid(gains[0])


def mean_gain(
    alone: TokenLogProbs | Failure,
    before: TokenLogProbs | Failure,
    after: TokenLogProbs | Failure,
    copied_run: int = 0,
) -> float | Failure:
    """Mean over the suffix's tokens of their log-prob in `after` less that in `before`, in nats.

    A server may split a text otherwise behind a prefix: the tokens that count are those at the end which all three
    readings have alike, with log-probs. `alone` is the suffix by itself and bounds them.

    copied_run: a token within so many in a row that stand before the suffix as well gains 0 at most; 0: none is
        looked for.
    """
    readings: list[TokenLogProbs] = []
    for one in (alone, before, after):
        if isinstance(one, Failure):
            return one
        readings.append(one)
    backwards = zip(*(reversed(one.tokens) for one in readings), strict=False)
    num = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, backwards))
    bare, less, more = (one.logprobs[len(one.logprobs) - num :] for one in readings)
    gains = more - less
    if copied_run:
        whole = (*readings[2].context, *readings[2].tokens)
        copied = copied_tokens(whole[: len(whole) - num], whole[len(whole) - num :], copied_run)
        gains = np.where(copied, np.minimum(gains, 0.0), gains)
    gains = gains[~np.isnan(more - less + bare)]
    if not len(gains):
        return Failure(
            "no token of the suffix could be compared: the server splits it otherwise after its prefix"
        )
    return float(gains.mean())


class LocalReader:
    """Reads with a model inside the engine: a prefix once for all its suffixes, packed rows, no sampling.

    A suffix's tokens are its own, whatever stands in front of it. Where prefix and suffix do not fit into the model's
    context, the prefix keeps its end, a multiple of 64 tokens, so that suffixes of like length still share it.
    """

    def __init__(self, model: LocalModel) -> None:
        self._model = model

    def read(self, readings: Sequence[Reading]) -> list[TokenLogProbs | Failure]:
        """One result a reading, in order; a Failure where the suffix alone exceeds the context."""
        policy, encode = self._model.policy, self._model.tokenizer.encode
        suffixes = [encode(one.suffix).astype(np.int32) for one in readings]
        contexts: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        groups: dict[tuple[str, str, int], list[int]] = {}
        for number, one in enumerate(readings):
            key = one.note, one.prefix
            if key not in contexts:
                contexts[key] = self._context(*key)
            head, prefix = contexts[key]
            room = policy.max_context - len(head) - len(suffixes[number])
            if room >= min(1, len(prefix)):
                kept = len(prefix) if len(prefix) <= room else (room - room % _STEP or room)
                groups.setdefault((*key, kept), []).append(number)
        rows, parts = [], []
        for (note, prefix, kept), group in groups.items():
            head, ids = contexts[note, prefix]
            context = np.concatenate([head, ids[len(ids) - kept :]])
            own = [len(suffixes[number]) for number in group]
            for part in split_by_tokens(own, max(1, policy.micro_batch_tokens - len(context))):
                numbers = [group[i] for i in part]
                parts.append(numbers)
                rows.append(Row(context, tuple(suffixes[number] for number in numbers)))
        found: dict[int, TokenLogProbs] = {}
        for numbers, row, scored in zip(parts, rows, policy.score_rows(rows) if rows else (), strict=True):
            context = tuple(row.prefix.tolist())
            for number, one in zip(numbers, scored, strict=True):
                read = round(len(row.prefix) / len(numbers)) + len(suffixes[number])
                tokens = tuple(suffixes[number].tolist())
                # With nothing in front, not even bos, the first token has no log-prob.
                logprobs = np.concatenate([np.full(len(tokens) - len(one.logprobs), np.nan), one.logprobs])
                found[number] = TokenLogProbs(tokens, logprobs.astype(np.float64), Cost(1, read), context)
        return [found.get(number, _TOO_LONG) for number in range(len(readings))]

    def _context(self, note: str, prefix: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that are always kept (what begins a text, the note), and the prefix's, which may lose its head."""
        encode, most = self._model.tokenizer.encode, self._model.cfg.max_prefix_chars
        head = [self._model.tokenizer.begin, encode(note_text(note)) if note else np.zeros(0)]
        return np.concatenate(head).astype(np.int32), encode(prefix[-most:] if most else prefix).astype(
            np.int32
        )


_TOO_LONG = Failure("a continuation alone is longer than the judge's context; shorten data.suffix_tokens")


def note_text(note: str) -> str:
    """The original as it stands in front of a prefix: a paragraph of its own."""
    return f"{note.strip()}\n\n"


def _gains_for(question: Question) -> list[Reading]:
    """What answers a question; nothing where mutual information has no answer."""
    match question:
        case PairQuestion(prefix, first, second):
            return [Reading("", prefix, first), Reading("", prefix, second)]
        case FactualityQuestion(prefix, reference, suffix):
            return [Reading(reference, prefix, suffix)] if reference.strip() else []
        case SafetyQuestion():
            return []


def _no_answer(question: Question) -> Failure:
    if isinstance(question, SafetyQuestion):
        return Failure("mutual information says nothing of safety: ask another judge")
    return Failure("the original is blank: it confirms nothing")


def _parts_of(gain: Reading) -> tuple[Reading, Reading, Reading]:
    """The readings that a gain is made of: the suffix alone, then without and with what should help."""
    alone, plain = Reading("", "", gain.suffix), Reading("", gain.prefix, gain.suffix)
    return (alone, plain, gain) if gain.note else (alone, alone, plain)


def _sigmoid(value: float) -> float:
    return 0.5 * (1.0 + math.tanh(value / 2))
