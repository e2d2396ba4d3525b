"""Continuations read one by one by a local judge that notes what it thinks of each sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sip_engine.data.tokenizer import Tokenizer
from sip_engine.judges.compact import reading_prompt
from sip_engine.judges.notes import NOTES, factuality_of, quality_of, sentence_ends
from sip_engine.judges.reading import Reading, first_tokens

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
        prompt, shown = reading_prompt(prefix, text, self._max_prefix_chars)
        ids = self._encode(prompt)
        if ids is None:
            return None
        start = len(prompt) - len(shown)
        ends = [start + end for end in _ends(shown)]
        return Reading(ids, self._options, 1 + self._tokenizer.places(ids[1:], prompt, ends), prefix)

    def worth(self, prefix: str, text: str, shares: Tensor) -> Worth:
        """shares: [sentences, notes] float64."""
        _, shown = reading_prompt(prefix, text, self._max_prefix_chars)
        ends = torch.tensor([0, *_ends(shown)], dtype=torch.float64)
        return Worth(float(quality_of(shares, ends.diff())), float(factuality_of(shares)))


def _ends(text: str) -> list[int]:
    """White space alone is one sentence, so that there is something to be noted."""
    return sentence_ends(text) or [len(text)]
