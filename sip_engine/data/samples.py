"""Cuts tokenized documents into samples: which prefix and suffix a sample number stands for."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

from sip_engine.data.permutation import hash_key, mix64
from sip_engine.utils.errors import ConfigError, DataError

Cut = Literal["every_chunk", "random_chunk"]


class SampleIndex:
    """Numbers the samples of a corpus in O(documents) memory.

    A document of L tokens (bos and eos count) is chunked from its start, N = `suffix_tokens` at a
    time; what is left over at its end, fewer than N tokens, is not used. A sample is a document and
    a cut, a multiple of N: its suffix is the chunk [cut, cut + N), its prefix the last
    `max_prefix_tokens` tokens before the cut (arXiv 2601.21343: the current chunk is the suffix,
    all before it in the same context the prefix). The first chunk is never a suffix.

    cut "every_chunk": each whole chunk is one sample, in document order.
    cut "random_chunk": each document is one sample, its chunk drawn anew in every epoch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        suffix_tokens: int,
        max_prefix_tokens: int,
        min_prefix_tokens: int = 1,
        cut: Cut = "every_chunk",
        seed: int = 0,
        starts: np.ndarray | None = None,
    ) -> None:
        """
        lengths: tokens of each document [num_documents], with bos and eos; set those of documents to
            leave out (held out, or another model's share) to 0.
        min_prefix_tokens: the fewest tokens before a cut, not counting bos.
        seed: also decides the order of samples in a `SampleStream`.
        starts: tokens of each document [num_documents] that belong to another index' suffixes; cuts come after.

        Raises ConfigError for settings that contradict each other, DataError if no document is long
        enough for one sample.
        """
        _check_settings(suffix_tokens, max_prefix_tokens, min_prefix_tokens, cut)
        self.suffix_tokens = suffix_tokens
        self.max_prefix_tokens = max_prefix_tokens
        self.min_prefix_tokens = min_prefix_tokens
        self.cut: Cut = cut
        self.seed = seed
        self._first_chunk = first_chunk(suffix_tokens, min_prefix_tokens)
        self._skipped = (
            None if starts is None else np.maximum(-(-starts // suffix_tokens) - self._first_chunk, 0)
        )
        num_cuts = np.asarray(lengths, dtype=np.int64) // suffix_tokens - self._first_chunk
        num_cuts = np.maximum(num_cuts if self._skipped is None else num_cuts - self._skipped, 0)
        if not num_cuts.any():
            raise self._nothing_to_cut(lengths)
        self.num_documents = len(num_cuts)
        self.num_too_short = int((num_cuts == 0).sum())
        """Documents that give no sample."""
        self._ends = np.cumsum(num_cuts)
        self.fingerprint = hashlib.sha256(self._ends.tobytes()).hexdigest()
        """Equal for indexes that find the same number of cuts in every document."""
        if cut == "random_chunk":
            self._documents = np.flatnonzero(num_cuts)

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return len(self._documents) if self.cut == "random_chunk" else int(self._ends[-1])

    def locate(self, samples: np.ndarray, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Documents [n] and cuts [n] (token offsets), int64, of sample numbers [n] in range(num_samples)."""
        if self.cut == "random_chunk":
            documents = self._documents[samples]
            begins, ends = self._cut_range(documents)
            draws = mix64(documents.astype(np.uint64) ^ hash_key(self.seed, epoch))
            chunks = (draws % (ends - begins).astype(np.uint64)).astype(np.int64)
        else:
            documents = np.searchsorted(self._ends, samples, side="right")
            chunks = samples - self._cut_range(documents)[0]
        if self._skipped is not None:
            chunks = chunks + self._skipped[documents]
        return documents, (self._first_chunk + chunks) * self.suffix_tokens

    def prefix_start(self, cut: int) -> int:
        """Token offset within the document at which the prefix of a cut begins."""
        return max(0, cut - self.max_prefix_tokens)

    def _cut_range(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cuts of all documents counted through: where those of each given document begin and end."""
        begins = np.where(documents > 0, self._ends[documents - 1], 0)
        return begins, self._ends[documents]

    def _nothing_to_cut(self, lengths: np.ndarray) -> DataError:
        needed = (self._first_chunk + 1) * self.suffix_tokens
        longest = int(np.max(lengths, initial=0))
        return DataError(
            f"no document is long enough for one sample: the longest has {longest} tokens, and suffixes of "
            f"{self.suffix_tokens} need {needed}; give longer documents or a smaller suffix_tokens"
        )


def first_chunk(suffix_tokens: int, min_prefix_tokens: int) -> int:
    """Number, from 0, of the first chunk of a document that may be a suffix: after bos and the shortest prefix."""
    return max(1, -(-(1 + min_prefix_tokens) // suffix_tokens))


def _check_settings(suffix_tokens: int, max_prefix_tokens: int, min_prefix_tokens: int, cut: str) -> None:
    if suffix_tokens < 1:
        raise ConfigError(f"suffix_tokens is {suffix_tokens} but must be at least 1; the paper uses 128")
    if not 0 <= min_prefix_tokens <= max_prefix_tokens or max_prefix_tokens < 1:
        raise ConfigError(
            f"min_prefix_tokens is {min_prefix_tokens} and max_prefix_tokens {max_prefix_tokens}, but "
            "0 <= min <= max and max >= 1 must hold; change one of them"
        )
    if cut not in ("every_chunk", "random_chunk"):
        raise ConfigError(f"cut is '{cut}' but must be 'every_chunk' or 'random_chunk'; use one of these")
