"""Which documents say what an earlier one says: exact copies by hash, near-duplicates by MinHash (datasketch)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from sip_engine.data.permutation import mix64
from sip_engine.data.token_files import TokenFiles
from sip_engine.utils.errors import ConfigError

SHINGLE = 5
"""Tokens of a shingle; two documents are as alike as their sets of shingles (Jaccard)."""
_PERMUTATIONS = 128
KEPT, COPY, NEAR = 0, 1, 2
_SEED = 20
_LARGEST = 0.9
"""For candidates: the index has no bands for more."""


class NearDuplicates:
    """Tells of each document in turn whether an earlier one is alike; about eight KB of memory a distinct document.

    Similarity is estimated from 128 minima, with a standard error of at most 0.044, over sets of five tokens in a row
    (Broder 1997; candidates by locality-sensitive hashing). Shorter documents are compared whole.
    """

    def __init__(self, threshold: float) -> None:
        """Raises ConfigError where the library is not installed."""
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise ConfigError("data.deduplicate needs datasketch: pip install datasketch") from None
        self._threshold = threshold
        self._empty = MinHash(_PERMUTATIONS, seed=_SEED, hashfunc=int)
        self._index = MinHashLSH(threshold=min(threshold, _LARGEST), num_perm=_PERMUTATIONS)
        self._minima: list[np.ndarray] = []
        self._whole: set[bytes] = set()

    def label(self, files: TokenFiles) -> Iterator[int]:
        """Of each document: KEPT, or why not."""
        for number in range(files.num_documents):
            yield self._label(files.tokens(number))

    def _label(self, ids: np.ndarray) -> int:
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        if digest in self._whole:
            return COPY
        self._whole.add(digest)
        if len(ids) < SHINGLE:
            return KEPT
        signature = self._empty.copy()
        signature.update_batch(_shingles(ids).tolist())
        for other in self._index.query(signature):
            assert isinstance(other, int)
            if (self._minima[other] == signature.hashvalues).mean() >= self._threshold:
                return NEAR
        self._index.insert(len(self._minima), signature, check_duplication=False)
        self._minima.append(signature.hashvalues)
        return KEPT


def _shingles(ids: np.ndarray) -> np.ndarray:
    """A 32-bit hash of each distinct five tokens in a row."""
    values = ids.astype(np.uint64)
    hashed = np.zeros(len(ids) - SHINGLE + 1, np.uint64)
    for place in range(SHINGLE):
        hashed = mix64(hashed ^ values[place : place + len(hashed)])
    return np.unique(hashed >> np.uint64(32))
