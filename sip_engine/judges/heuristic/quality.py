"""Quality of a continuation in [0, 1], on the scale of a corpus's own held-out text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice

import numpy as np

from sip_engine.judges.heuristic.features import Features, PrefixView, measure
from sip_engine.judges.heuristic.ngram import NgramModel, split_words
from sip_engine.utils.errors import DataError

_WEIGHTS = Features(
    fluency=0.18,
    order=0.22,
    distinct=0.10,
    freshness=0.04,
    letters=0.04,
    form=0.04,
    diversity=0.08,
    topic=0.20,
    thread=0.10,
)
# A corpus may hardly vary on one feature: differences below these are never made to look large.
_MIN_SPREAD = Features(
    fluency=0.1,
    order=0.1,
    distinct=0.15,
    freshness=0.2,
    letters=0.1,
    form=0.03,
    diversity=0.05,
    topic=0.05,
    thread=0.05,
)
_SHARPNESS = 2.0
_FULL_LENGTH = 16
"""Words from which a suffix is not held to be short."""

_SUFFIX_WORDS = 96
"""About 128 tokens of English."""
_MIN_SUFFIX_WORDS = 16
_PREFIX_WORDS = 2 * _SUFFIX_WORDS
_MIN_TEXTS = 20
_PIECE_CHARS = 2_000
_HOLD_OUT_EVERY = 5
_MIN_WINDOWS, _MAX_WINDOWS = 4, 2_000
_WORD_AND_SPACE = re.compile(r"\S+\s*")


class QualityModel:
    """A weighted geometric mean of nine features, each scored against held-out text of the corpus.

    A feature x of typical value m and spread s (mean and standard deviation over held-out windows) scores
    logistic(2 (min(z, 0) + 1)) with z = (x - m) / s: 0.88 for a typical value *or a better one*, 0.5 one
    spread below, about 0 from three spreads below. Nothing is gained by exceeding the corpus, so that
    the most predictable text does not win; and the geometric mean lets one very bad side spoil the rest.
    """

    def __init__(self, ngrams: NgramModel, windows: Iterable[tuple[str, str]]) -> None:
        """`windows` are (prefix, suffix) texts that `ngrams` has not counted; they set the scale."""
        self._ngrams = ngrams
        rows = [
            measure(suffix, split_words(suffix), PrefixView.read(prefix), ngrams)
            for prefix, suffix in windows
        ]
        self._typical = np.mean(rows, axis=0)
        self._spread = np.maximum(np.std(rows, axis=0), _MIN_SPREAD)
        self._weights = np.array(_WEIGHTS)
        # All pairs of a group ask for each candidate many times, after one prefix.
        self._view = lru_cache(maxsize=64)(PrefixView.read)
        self._cached_quality = lru_cache(maxsize=4096)(self._quality)

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> QualityModel:
        """Count four fifths of the texts and set the scale by the last fifth.

        Fewer than 20 texts are cut into pieces of 2,000 characters first. Raises DataError when that leaves
        fewer than four held-out windows.
        """
        texts = [text for text in texts if text.strip()]
        units = texts if len(texts) >= _MIN_TEXTS else [piece for text in texts for piece in _pieces(text)]
        held_out = units[_HOLD_OUT_EVERY - 1 :: _HOLD_OUT_EVERY]
        windows = list(islice((window for unit in held_out for window in cut_windows(unit)), _MAX_WINDOWS))
        if len(windows) < _MIN_WINDOWS:
            raise DataError(
                f"sample of {len(texts)} texts, {sum(map(len, texts))} characters: its held-out fifth gives "
                f"{len(windows)} windows of text, the heuristic judge needs {_MIN_WINDOWS}; give more text"
            )
        return cls(NgramModel(unit for i, unit in enumerate(units, 1) if i % _HOLD_OUT_EVERY), windows)

    def quality(self, prefix: str, suffix: str) -> float:
        """Quality in [0, 1]; exactly 0 for a suffix without a visible character."""
        return self._cached_quality(prefix, suffix)

    def scores(self, prefix: str, suffix: str) -> Features:
        """Each feature on its own, in [0, 1]: why a suffix was judged as it was. Needs one word at least."""
        return Features(*np.exp(self._log_scores(prefix, suffix, split_words(suffix))).tolist())

    def _quality(self, prefix: str, suffix: str) -> float:
        words = split_words(suffix)
        if not words:
            return 0.0
        length = min(len(words) / _FULL_LENGTH, 1.0)
        return length * float(np.exp(self._weights @ self._log_scores(prefix, suffix, words)))

    def _log_scores(self, prefix: str, suffix: str, words: Sequence[str]) -> np.ndarray:
        features = measure(suffix, words, self._view(prefix), self._ngrams)
        below = np.minimum((np.array(features) - self._typical) / self._spread, 0.0)
        return -np.logaddexp(0.0, -_SHARPNESS * (below + 1.0))


def cut_windows(text: str) -> Iterator[tuple[str, str]]:
    """(prefix, suffix) cuts: suffixes of about 128 tokens, or half the document where it is short."""
    words = _WORD_AND_SPACE.findall(text)
    length = min(_SUFFIX_WORDS, len(words) // 2)
    if length < _MIN_SUFFIX_WORDS:
        return
    for at in range(length, len(words) - length + 1, length):
        yield "".join(words[max(at - _PREFIX_WORDS, 0) : at]), "".join(words[at : at + length])


def _pieces(text: str) -> Iterator[str]:
    text = " ".join(text.split())
    return (text[start : start + _PIECE_CHARS] for start in range(0, len(text), _PIECE_CHARS))
