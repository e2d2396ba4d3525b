"""Rules for the factuality question: does a suffix agree with the original on names and numbers?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

TRUE, POSSIBLE, FALSE = 1.0, 0.5, 0.0

TAIL_CHARS = 60
"""As much of the text before is enough for `Facts.read`."""

# A word or a number; a possessive ending belongs to neither.
_TOKEN = re.compile(
    r"([^\W\d_]+(?:['\u2019-](?!s\b)[^\W\d_]+)*|\d+(?:[.,:/]\d+)*)(?:['\u2019]s\b)?", re.IGNORECASE
)
# Between two words of one sentence: commas and the like, a line break, but no empty line.
_INSIDE_SENTENCE = re.compile(r"(?:[^\S\n]|\n(?!\s*\n)|[,&/%$€£\u2013-])*")
_YEAR = re.compile(r"1\d{3}|20\d{2}")
_FUNCTION_WORDS = frozenset(
    """
    a about above after again all also an and any are as at be because been before being below between
    both but by can could did do does down during each either few for from further had has have having
    he her here him his how i if in into is it its itself just like made many may me might more most
    much must my neither no nor not now of off on once one only or other our out over own same shall she
    should since so some such than that the their them then there these they this those through to too
    under until up upon us very was we were what when where which while who whom whose why will with
    within without would yet you your
    """.split()  # noqa: SIM905
)


class _Place(NamedTuple):
    """Where a number stands: `side` ("before" or "after") of `word`. Years compare with years only."""

    side: str
    word: str
    is_year: bool


@dataclass(frozen=True)
class Facts:
    """What one text mentions, in lower case, possessives cut."""

    words: frozenset[str]
    """Every word and number."""
    content: frozenset[str]
    """Numbers, and words of four letters or more that are not function words."""
    names: frozenset[str]
    """Words with a capital inside a sentence."""
    numbers: tuple[tuple[str, tuple[_Place, ...]], ...]
    """Every number of the text with its places."""
    by_place: dict[_Place, list[str]]
    """The numbers at each place."""
    last: str
    """The last word or number if the text ends in it, hence perhaps in its middle; else empty."""

    @classmethod
    def read(cls, text: str, before: str = "") -> Facts:
        """Read `text`, which goes on where `before` ends, perhaps in the middle of a word or sentence."""
        tokens = _Tokens(before + text)
        own = [i for i, end in enumerate(tokens.ends) if end > len(before)]
        words = [tokens.words[i] for i in own]
        numbers = tuple((tokens.words[i], tokens.places(i)) for i in own if tokens.words[i][0].isdigit())
        by_place: dict[_Place, list[str]] = {}
        for number, places in numbers:
            for place in places:
                by_place.setdefault(place, []).append(number)
        return cls(
            words=frozenset(words),
            content=frozenset(word for word in words if _is_content(word)),
            names=frozenset(tokens.words[i] for i in own if tokens.is_name(i)),
            numbers=numbers,
            by_place=by_place,
            last=words[-1] if words and text[-1].isalnum() else "",
        )


def agreement(prefix: Facts, reference: Facts, suffix: Facts) -> float:
    """Factuality of `suffix` given the original one, `reference` (method, factuality reward).

    FALSE: a number stands at a place where the reference has another one. POSSIBLE: a name or a number that
    neither prefix nor reference mentions; also a suffix that shares no content word with the reference, since
    saying nothing must not beat saying it right. TRUE otherwise.
    """
    if any(_contradicts(number, places, prefix, reference, suffix) for number, places in suffix.numbers):
        return FALSE
    known = prefix.words | reference.words
    claims = suffix.names | {number for number, _ in suffix.numbers}
    if any(claim != suffix.last or not _begins_one_of(claim, known) for claim in claims - known):
        return POSSIBLE
    return TRUE if suffix.content & reference.content else POSSIBLE


def _contradicts(
    number: str, places: Iterable[_Place], prefix: Facts, reference: Facts, suffix: Facts
) -> bool:
    """The reference has other numbers at one of the places, and this one stands there in neither text."""
    rivals = [rival for place in places for rival in reference.by_place.get(place, ())]
    if not rivals or any(number in prefix.by_place.get(place, ()) for place in places):
        return False
    # Either text may be cut in the middle of its last number.
    return not any(
        number == rival
        or (number == suffix.last and rival.startswith(number))
        or (rival == reference.last and number.startswith(rival))
        for rival in rivals
    )


def _begins_one_of(fragment: str, words: Iterable[str]) -> bool:
    return any(word.startswith(fragment) for word in words)


class _Tokens:
    """Words and numbers of a text, lower case, and what stands beside them."""

    def __init__(self, text: str) -> None:
        matches = list(_TOKEN.finditer(text))
        self.words = [match[1].lower() for match in matches]
        self.ends = [match.end() for match in matches]
        self._starts = [match.start() for match in matches]
        self._text = text

    def is_name(self, index: int) -> bool:
        """Has a capital, and not because a sentence begins."""
        capital = self._text[self._starts[index]].isupper()
        return capital and self.words[index] not in _FUNCTION_WORDS and self._joined(index - 1)

    def places(self, index: int) -> tuple[_Place, ...]:
        """Beside a year any word makes a place ("in 1912"), beside another number function words do not."""
        is_year = _YEAR.fullmatch(self.words[index]) is not None
        neighbours = []
        if self._joined(index - 1):
            neighbours.append(("after", self.words[index - 1]))
        if self._joined(index):
            neighbours.append(("before", self.words[index + 1]))
        return tuple(
            _Place(side, word, is_year)
            for side, word in neighbours
            if not word[0].isdigit() and (is_year or word not in _FUNCTION_WORDS)
        )

    def _joined(self, index: int) -> bool:
        """Tokens `index` and `index + 1` both exist and stand in one sentence."""
        if not 0 <= index < len(self.words) - 1:
            return False
        return _INSIDE_SENTENCE.fullmatch(self._text, self.ends[index], self._starts[index + 1]) is not None


def _is_content(word: str) -> bool:
    return word[0].isdigit() or (len(word) > 3 and word not in _FUNCTION_WORDS)
