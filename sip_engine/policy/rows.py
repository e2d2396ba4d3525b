"""What an update is made of, without torch: rows of token ids with what is known of their tokens, and loss sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sip_engine.types import Labels, Sample

if TYPE_CHECKING:
    from torch import Tensor

SideValues = tuple["np.ndarray | float | None", ...]
"""A value for each scored token of each suffix: an array [num_scored], one number for all of them, or None."""


@dataclass(frozen=True)
class Row:
    """One prefix and the suffixes to be scored on it, as int arrays of token ids.

    A suffix token is predicted from the token before it. With an empty prefix the first token of a
    suffix has nothing before it and is not scored. `labels`, one for each suffix, are scored instead.

    Side values are packed with the tokens they belong to, as float32. Empty: the row has none.
    """

    prefix: np.ndarray
    suffixes: tuple[np.ndarray, ...]
    labels: tuple[Labels, ...] = ()
    sampled: SideValues = ()
    """Log-prob (nats, temperature 1) of each token under the policy that sampled it; None: it was not sampled."""
    advantages: SideValues = ()
    """How much better than its group's mean the reward of each token's sequence is."""
    weights: SideValues = ()
    """Factor of each token's loss; None is 1."""
    document_weight: float = 0.0
    """Above 0: the last suffix is the document's own, which no objective sees, and this the factor of each of its
    tokens' negative log-likelihood (`objectives.document_term`)."""
    document: int | None = None
    """Number of the document, for error messages."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix and all suffixes."""
        return len(self.prefix) + sum(len(s) for s in self.suffixes)

    @property
    def num_scored(self) -> tuple[int, ...]:
        """Scored tokens of each suffix."""
        if self.labels:
            return tuple(len(labels.ids) for labels in self.labels)
        return tuple(len(s) - (len(self.prefix) == 0) for s in self.suffixes)

    def side_values(self, name: str, missing: float) -> np.ndarray:
        """[sum of num_scored] float32: side values `name` of all scored tokens, `missing` where there are none."""
        values: SideValues = getattr(self, name) or (None,) * len(self.suffixes)
        parts = [
            np.broadcast_to(np.asarray(missing if value is None else value, np.float32), number)
            for number, value in zip(self.num_scored, values, strict=True)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def row_of(sample: Sample) -> Row:
    """A sample's prefix and suffix; the labels of the suffix, if it has any."""
    labels = (sample.labels,) if sample.labels else ()
    return Row(sample.prefix_ids, (sample.suffix_ids,), labels, document=sample.document)


def documents_of(rows: Sequence[Row]) -> str:
    """The documents of a batch, for error messages: a few by number, the rest counted."""
    shown = ", ".join(str(row.document) for row in rows[:8])
    return (shown if len(rows) <= 8 else f"{shown} and {len(rows) - 8} more") or "none"


class LossSums(NamedTuple):
    """What a loss finds of one micro-batch. The update divides by the units of all micro-batches and processes."""

    loss: Tensor
    """[] float32, differentiable: a sum over `units`."""
    units: int
    """Tokens, pairs or sequences that the loss sums over; 0 where it has nothing to say."""
    sums: Mapping[str, float | Tensor] = MappingProxyType({})
    """Figures to log that add up over micro-batches and processes: numbers, or tensors [] without gradient. The
    update reads those of all micro-batches at once; `.item()` would wait for the device in each."""
    maxima: Mapping[str, float | Tensor] = MappingProxyType({})
    """Figures to log of which the largest counts."""
