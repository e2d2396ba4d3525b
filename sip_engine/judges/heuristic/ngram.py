"""Word trigram model with Kneser-Ney smoothing: how probable is a text, word by word?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

UNKNOWN, START, NUMBER = 0, 1, 2
"""Ids of words outside the vocabulary, of the start of a text, and of every number."""

_FIRST_WORD_ID = 3
_ID_BITS = 20
_WORD_MASK = (1 << _ID_BITS) - 1
_BIGRAM_MASK = (1 << 2 * _ID_BITS) - 1
_MAX_VOCAB = 1 << 18
_NUM_COMMON = 150
_DISCOUNT = 0.75
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*|\d+(?:[.,]\d+)*|_+|[^\w\s]+")


def split_words(text: str) -> list[str]:
    """Lower-case words, numbers and runs of punctuation, in order; white space is dropped."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class _Order:
    """Discounted probabilities of the n-grams seen, and the mass each context leaves to the order below.

    An n-gram (or context) is one int64 key: its word ids, `_ID_BITS` each. Keys are sorted.
    """

    keys: np.ndarray
    probs: np.ndarray
    context_keys: np.ndarray
    backoff: np.ndarray

    @classmethod
    def from_counts(cls, keys: np.ndarray, counts: np.ndarray) -> _Order:
        """`keys`: int64 [num_ngrams], sorted and distinct; `counts`: int64 [num_ngrams]."""
        context_keys, context = np.unique(keys >> _ID_BITS, return_inverse=True)
        totals = np.bincount(context, weights=counts)
        backoff = _DISCOUNT * np.bincount(context) / totals
        return cls(keys, (counts - _DISCOUNT) / totals[context], context_keys, backoff)

    def interpolate(self, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probability of the last word of each key, given `lower`, its probability one order down."""
        seen = _look_up(self.keys, self.probs, keys, missing=0.0)
        return seen + _look_up(self.context_keys, self.backoff, keys >> _ID_BITS, missing=1.0) * lower


class NgramModel:
    """Interpolated Kneser-Ney trigrams over lower-case words (Kneser & Ney 1995; one discount of 0.75).

    Words seen once (or beyond the 2^18 most frequent) share the UNKNOWN id; its probability is divided
    evenly among the words of the sample it stands for, so that invented words are not cheap. Counts are
    sorted arrays: at most 64 bytes for each word of the sample, and no object for each.
    """

    common_words: frozenset[str]
    """The most frequent words of the sample: they say little about what a text is about."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Count `texts`, which hold one word at least."""
        words_of_texts = [split_words(text) for text in texts]
        frequency = Counter(word for words in words_of_texts for word in words if not word[0].isdigit())
        by_frequency = sorted(frequency.items(), key=lambda item: (-item[1], item[0]))
        known = [word for word, count in by_frequency[:_MAX_VOCAB] if count > 1]
        self.common_words = frozenset(known[:_NUM_COMMON])
        self._ids = {word: _FIRST_WORD_ID + rank for rank, word in enumerate(known)}
        self._log_num_unknown = float(np.log(max(len(frequency) - len(known), 1)))

        occurrences = np.concatenate([self._trigram_keys(words) for words in words_of_texts])
        vocab_size = _FIRST_WORD_ID + len(known)
        trigrams, counts = np.unique(occurrences, return_counts=True)
        bigrams, num_left = np.unique(trigrams & _BIGRAM_MASK, return_counts=True)
        self._trigram = _Order.from_counts(trigrams, counts)
        self._bigram = _Order.from_counts(bigrams, num_left)
        self._unigram = _unigram(np.bincount(bigrams & _WORD_MASK, minlength=vocab_size))
        self._alone = _unigram(np.bincount(occurrences & _WORD_MASK, minlength=vocab_size))

    def logprobs(self, words: Sequence[str], context: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of each word in its place, and of each word alone. Both float64 [num_words], nats.

        `words` and `context` come from `split_words`. `context` holds the words before; its last two count,
        and the start of a text stands for those that are missing. The difference of the two results says
        how well the words fit their places, however rare they are.
        """
        keys = self._trigram_keys(words, context)
        last = keys & _WORD_MASK
        probs = self._bigram.interpolate(keys & _BIGRAM_MASK, self._unigram[last])
        probs = self._trigram.interpolate(keys, probs)
        share = self._log_num_unknown * (last == UNKNOWN)
        return np.log(probs) - share, np.log(self._alone[last]) - share

    def _trigram_keys(self, words: Sequence[str], context: Sequence[str] = ()) -> np.ndarray:
        """One key a word: the two words before it and itself. int64 [num_words]."""
        get = self._ids.get
        ids = [START] * (2 - min(len(context), 2))
        ids += [get(word, NUMBER if word[0].isdigit() else UNKNOWN) for word in (*context[-2:], *words)]
        row = np.array(ids, dtype=np.int64)
        return (row[:-2] << 2 * _ID_BITS) | (row[1:-1] << _ID_BITS) | row[2:]


def _unigram(counts: np.ndarray) -> np.ndarray:
    """Discounted relative frequencies; the mass taken is spread evenly. float64 [vocab_size], sums to 1."""
    discounted = np.maximum(counts - _DISCOUNT, 0.0) / counts.sum()
    return discounted + (1.0 - discounted.sum()) / len(counts)


def _look_up(table_keys: np.ndarray, values: np.ndarray, keys: np.ndarray, *, missing: float) -> np.ndarray:
    """The value of each key in a sorted table, `missing` where the table lacks it."""
    at = np.minimum(np.searchsorted(table_keys, keys), len(table_keys) - 1)
    return np.where(table_keys[at] == keys, values[at], missing)
