"""A judge's notes: what it thinks of each sentence of a continuation, and what they say of the whole.

A judge that is trained with `sip data notes` says at the end of every sentence it reads, in one letter, what there is
to say of it (`types.Note`): all of a continuation in one pass, without writing anything. Such step labels, as of a
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
from sip_engine.judges.compact import reading_prompt
from sip_engine.judges.fences import neutral
from sip_engine.judges.reading import Reading, first_tokens
from sip_engine.types import UNSOUND, Note

SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+")
NOTES = tuple(Note)
_TRUTH = {Note.TRUE: 1.0, Note.UNCERTAIN: 0.5, Note.FALSE: 0.0}
Encode = Callable[[str], np.ndarray | None]
"""A prompt's tokens with bos in front, None if the model's context cannot hold them."""


class Worth(NamedTuple):
    """What a continuation is worth, in [0, 1]."""

    quality: float
    factuality: float


class NoteReader:
    """Turns a continuation into one reading, and the notes that are weighed there into its worth."""

    def __init__(self, tokenizer: Tokenizer, encode: Encode, max_prefix_chars: int | None) -> None:
        self._tokenizer, self._encode, self._max_prefix_chars = tokenizer, encode, max_prefix_chars
        self._options = first_tokens(tokenizer, NOTES)

    def reading(self, prefix: str, text: str) -> Reading | None:
        """The notes are weighed at the ends of the continuation's sentences; None if it is too long to be read."""
        prompt, start = reading_prompt(prefix, text, self._max_prefix_chars)
        ids = self._encode(prompt)
        if ids is None:
            return None
        ends = [start + end for end in sentence_ends(prompt[start:])]
        return Reading(ids, self._options, 1 + self._tokenizer.places(ids[1:], prompt, ends), prefix)

    def worth(self, text: str, shares: Tensor) -> Worth:
        """shares: [sentences, notes] float64."""
        ends = torch.tensor([0, *sentence_ends(neutral(text))], dtype=torch.float64)
        return Worth(float(quality_of(shares, ends.diff())), float(factuality_of(shares)))


def sentence_ends(text: str) -> list[int]:
    """Where each sentence of a text ends, in characters; white space alone is none, unless there is nothing else."""
    return [match.end() for match in SENTENCE.finditer(text) if match[0].strip()] or [len(text)]


def coherence_of(shares: Tensor, lengths: Tensor) -> Tensor:
    """Expected share of the characters in sentences that are well-formed, new, and about the right people.

    0 if there are no characters.
    """
    sound = 1.0 - shares[:, [NOTES.index(note) for note in UNSOUND]].sum(dim=1)
    return (sound * lengths).sum() / lengths.sum().clamp(min=1.0)


def factuality_of(shares: Tensor) -> Tensor:
    """Expected mean truth of the sentences that claim something; 0 if none does."""
    claims = shares[:, [NOTES.index(note) for note in _TRUTH]].sum(dim=0)
    truth = claims @ claims.new_tensor(list(_TRUTH.values()))
    return truth / claims.sum().clamp(min=1.0)


def quality_of(shares: Tensor, lengths: Tensor) -> Tensor:
    """Coherence first, then factuality (method §rewards): coherence * (1 + factuality) / 2.

    shares: [sentences, notes] probabilities, in the order of `NOTES`; lengths: [sentences], in characters.
    """
    return coherence_of(shares, lengths) * (1.0 + factuality_of(shares)) / 2.0
