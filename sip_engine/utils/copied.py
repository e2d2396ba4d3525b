"""Which tokens of a text are copied: runs of them that stand in what came before as well."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

RUN = 4
"""Tokens in a row that count as a copy: fewer are names and turns of phrase, and a copy with a word changed here and
there has no more (`benchmarks/README.md`, mutual information)."""


def copied_tokens(before: Sequence[Hashable], text: Sequence[Hashable], run: int = RUN) -> np.ndarray:
    """[len(text)] bool: which tokens lie within `run` tokens in a row that stand in `before` as well."""
    known = {tuple(before[at : at + run]) for at in range(len(before) - run + 1)}
    copied = np.zeros(len(text), bool)
    for at in range(len(text) - run + 1):
        if tuple(text[at : at + run]) in known:
            copied[at : at + run] = True
    return copied
