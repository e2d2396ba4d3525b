"""A keyed pseudo-random permutation of range(n), computed per index in O(1) memory."""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


def mix64(values: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64 values: the finalizer of SplitMix64 (Steele et al., 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_key(*parts: int) -> np.ndarray:
    """One uint64 (shape [1]) that depends on all parts and on their order."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix64(key ^ np.uint64(part % 2**64))
    return key


class Permutation:
    """A bijection of range(size) chosen by `key`, a tuple of ints.

    A balanced Feistel network permutes the next power of four; values outside range(size) are sent
    through again until they are inside (cycle walking), fewer than four times on average.
    """

    def __init__(self, size: int, *key: int) -> None:
        """size: from 1 to 2**62."""
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._half_mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        self._round_keys = [hash_key(*key, number) for number in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Images [n] int64 of positions [n], each in range(size)."""
        values = self._feistel(positions.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._feistel(values[outside])
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (mix64(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right
