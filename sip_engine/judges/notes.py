"""A judge's notes on the sentences of a continuation, and what they say of the whole.

A judge that is trained with `sip data notes` says at the end of every sentence it reads, in one letter, what there is
to say of it (`types.Note`): all of a continuation in one pass, without writing anything. Step labels, as of a process
reward model, tell a small model far more than one verdict on two texts does.
"""

from __future__ import annotations

import re

from torch import Tensor

from sip_engine.types import UNSOUND, Note

SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+")
NOTES = tuple(Note)
_TRUTH = {Note.TRUE: 1.0, Note.UNCERTAIN: 0.5, Note.FALSE: 0.0}


def sentence_ends(text: str) -> list[int]:
    """Where each sentence of a text ends, in characters; white space alone is none."""
    return [match.end() for match in SENTENCE.finditer(text) if match[0].strip()]


def coherence_of(shares: Tensor, lengths: Tensor) -> Tensor:
    """Expected share of the characters in sentences that are well-formed, new, and about the right people."""
    sound = 1.0 - shares[:, [NOTES.index(note) for note in UNSOUND]].sum(dim=1)
    return (sound * lengths).sum() / lengths.sum()


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
