"""A judge's sentence labels: what it thinks of each sentence of a continuation, and what they say of the whole.

A judge that is trained with `sip data sentence-labels` labels the end of every sentence it reads with one letter
(`types.SentenceLabel`): all of a continuation in one pass, without writing anything. Such step labels, as of a
process reward model, teach a small model far more than one verdict on two texts does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sip_engine.data.tokenizer import Tokenizer
from sip_engine.llm.compact_prompts import reading_prompt
from sip_engine.llm.option_probs import OptionQuery, first_tokens
from sip_engine.llm.untrusted import neutral
from sip_engine.types import UNSOUND, SentenceLabel

SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+")
LABEL_LETTERS = tuple(
    label.letter(insulting=insulting) for insulting in (False, True) for label in SentenceLabel
)
"""All letters that a label is written in."""
_TRUTH = {SentenceLabel.TRUE: 1.0, SentenceLabel.UNCERTAIN: 0.5, SentenceLabel.FALSE: 0.0}
_WORDS_PER_TRUTH = 10
_MIN_TRUTHS = 2
Encode = Callable[[str], np.ndarray | None]
"""A prompt's tokens begun as the model begins a text, None if the model's context cannot hold them."""


class Scores(NamedTuple):
    """Scores of a continuation, in [0, 1]."""

    quality: float
    safety: float
    factuality: float


EMPTY = Scores(0.0, 1.0, 0.0)
"""Of a continuation that says nothing: there is nothing to label."""


class SentenceLabelReader:
    """Turns a continuation into one query, and the answers to it into scores."""

    def __init__(self, tokenizer: Tokenizer, encode: Encode, max_prefix_chars: int | None) -> None:
        self._tokenizer, self._encode, self._max_prefix_chars = tokenizer, encode, max_prefix_chars
        self._options = first_tokens(tokenizer, LABEL_LETTERS)

    def query(self, prefix: str, text: str) -> OptionQuery | None:
        """The labels are asked for at the ends of the continuation's sentences; None if it is too long to be read."""
        prompt, start = reading_prompt(prefix, text, self._max_prefix_chars)
        ids = self._encode(prompt)
        if ids is None:
            return None
        begun = len(self._tokenizer.begin)
        ends = [start + end for end in sentence_ends(prompt[start:])]
        positions = begun + self._tokenizer.positions(ids[begun:], prompt, ends)
        return OptionQuery(ids, self._options, positions, prefix)

    def scores(self, text: str, probs: Tensor) -> Scores:
        """probs: [sentences, letters] float64, in the order of `LABEL_LETTERS`."""
        ends = torch.tensor([0, *sentence_ends(neutral(text))], dtype=torch.float64)
        return scores_of(probs, ends.diff(), len(text.split()))


def sentence_ends(text: str) -> list[int]:
    """Where each sentence of a text ends, in characters; white space alone is none, unless there is nothing else."""
    return [match.end() for match in SENTENCE.finditer(text) if match[0].strip()] or [len(text)]


def scores_of(probs: Tensor, lengths: Tensor, num_words: int) -> Scores:
    """What the labels say of the whole: coherence first, then factuality, then general quality (method, "Rewards").

    quality = coherence * (0.4 + 0.4 factuality + 0.15 informativeness + 0.05 civility), where
    coherence: share of the characters in sentences that are well-formed, new, and about the right people;
    factuality: mean truth of the sentences that claim something, 0 if none does;
    informativeness: true sentences, of one for every ten words and at least two;
    civility: share of the characters in sentences without an insult; each expected under the probs.
    safety: the probability that no sentence insults, taking them for independent.

    probs: [sentences, letters] probabilities, in the order of `LABEL_LETTERS`; lengths: [sentences], in characters.
    """
    by_label = probs.unflatten(1, (2, len(SentenceLabel))).sum(dim=1)  # [sentences, labels]
    of = dict(zip(SentenceLabel, by_label.unbind(dim=1), strict=True))
    all_chars = lengths.sum().clamp(min=1.0)
    sound = 1.0 - sum(of[label] for label in UNSOUND)
    coherence = float((sound * lengths).sum() / all_chars)
    civil = probs[:, : len(SentenceLabel)].sum(dim=1)
    civility = float((civil * lengths).sum() / all_chars)
    truth = float(sum(value * of[label].sum() for label, value in _TRUTH.items()))
    factuality = truth / max(1.0, float(sum(of[label].sum() for label in _TRUTH)))
    informativeness = min(1.0, truth / max(_MIN_TRUTHS, num_words / _WORDS_PER_TRUTH))
    general = 0.4 + 0.4 * factuality + 0.15 * informativeness + 0.05 * civility
    return Scores(coherence * general, float(civil.prod()), factuality)
