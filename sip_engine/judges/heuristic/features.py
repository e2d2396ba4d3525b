"""Nine measurements of a continuation, each higher for better text, and what they need of its prefix."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sip_engine.judges.heuristic.ngram import NgramModel, split_words

_COPY_SPAN = 8
_OPENER_OF = {")": "(", "]": "[", "}": "{", "”": "“"}
_BRACKET = re.compile(r"[()\[\]{}“”]")
# Control and replacement characters; a quote between two letters; a quote or stop between two spaces.
_BROKEN = r"\x00-\x08\x0e-\x1f\ufffd"
_FAULT = re.compile(rf'[",;.{_BROKEN}](?:(?<=[{_BROKEN}])|(?<=\w")(?=\w)|(?<=\s.)(?=\s))')


class Features(NamedTuple):
    """Raw measurements of one suffix after one prefix. Higher is better; only differences have a meaning."""

    fluency: float
    """Mean log-prob of a word given the two before it, nats."""
    order: float
    """What the two words before add to a word's log-prob, mean, nats: word order apart from rarity."""
    distinct: float
    """Distinct over all trigrams, in [0, 1]."""
    freshness: float
    """Share of the runs of eight words that the prefix does not hold already, in [0, 1]."""
    letters: float
    """Letters over visible characters, in [0, 1]."""
    form: float
    """Minus the faults (stutters, stray closing brackets, misplaced quotes, broken characters) per word."""
    diversity: float
    """Entropy of the suffix's words over its maximum, the log of their number, in [0, 1]."""
    topic: float
    """Share of the suffix's distinct uncommon words that the prefix uses too, in [0, 1]."""
    thread: float
    """Share of the uncommon words that the prefix or another place of the suffix uses too, in [0, 1]."""


@dataclass(frozen=True)
class PrefixView:
    """What the measurements need of a prefix, read once for all its continuations."""

    words: tuple[str, ...]
    vocabulary: frozenset[str]
    spans: frozenset[tuple[str, ...]]
    open_brackets: Counter[str]

    @classmethod
    def read(cls, text: str) -> PrefixView:
        words = split_words(text)
        open_brackets, _ = _match_brackets(text, Counter())
        return cls(tuple(words[-2:]), frozenset(words), frozenset(_spans(words, _COPY_SPAN)), open_brackets)


def measure(suffix: str, words: Sequence[str], prefix: PrefixView, model: NgramModel) -> Features:
    """Features of `suffix`; `words` are its `split_words`, one at least."""
    in_place, alone = model.logprobs(words, prefix.words)
    fluency = float(in_place.mean())
    uncommon = [word for word in words if word[0].isalpha() and word not in model.common_words]
    return Features(
        fluency=fluency,
        order=fluency - float(alone.mean()),
        distinct=len(set(_spans(words, 3))) / max(len(words) - 2, 1),
        freshness=1.0 - _share(span in prefix.spans for span in _spans(words, _COPY_SPAN)),
        letters=_share(map(str.isalpha, "".join(suffix.split()))),
        form=-min(_num_faults(suffix, words, prefix) / len(words), 1.0),
        diversity=_entropy_ratio(words),
        topic=_share(word in prefix.vocabulary for word in set(uncommon)),
        thread=_thread(uncommon, prefix),
    )


def _thread(uncommon: Sequence[str], prefix: PrefixView) -> float:
    count = Counter(uncommon)
    return _share(count[word] > 1 or word in prefix.vocabulary for word in uncommon)


def _entropy_ratio(words: Sequence[str]) -> float:
    total = len(words)
    if total < 2:
        return 0.0
    log_total = math.log(total)
    return 1.0 - sum(count * math.log(count) for count in Counter(words).values()) / (total * log_total)


def _num_faults(suffix: str, words: Sequence[str], prefix: PrefixView) -> int:
    """Brackets still open at the end are no fault: a suffix is not worse for being cut off."""
    # A cut between tokens may split a character at either end.
    _, num_stray = _match_brackets(suffix, prefix.open_brackets)
    num_stutters = sum(map(str.__eq__, words, words[1:]))
    return num_stray + num_stutters + len(_FAULT.findall(suffix.strip("\ufffd")))


def _match_brackets(text: str, already_open: Counter[str]) -> tuple[Counter[str], int]:
    """Openers left open at the end, and the number of closers that had none."""
    open_brackets, num_stray = Counter(already_open), 0
    for bracket in _BRACKET.findall(text):
        opener = _OPENER_OF.get(bracket)
        if opener is None:
            open_brackets[bracket] += 1
        elif open_brackets[opener]:
            open_brackets[opener] -= 1
        else:
            num_stray += 1
    return open_brackets, num_stray


def _spans(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(length)), strict=False))


def _share(flags) -> float:
    flags = list(flags)
    return sum(flags) / max(len(flags), 1)
