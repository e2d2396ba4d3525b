"""Word list of unsafe language, matched through the usual disguises."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from sip_engine.utils.errors import DataError
from sip_engine.utils.regular import read_text

DEFAULT_PATH = Path(__file__).with_name("unsafe_words.txt")

_ACCENT_OR_INVISIBLE = frozenset({"Mn", "Cf"})
_PLAIN_WORD = re.compile(r"[^\W_]+")
_LEET_WORD = re.compile(r"(?:[^\W_]|[@$!])+")
_LEET_SIGN = re.compile(r"[@$!0-9]")
_LEET_TABLES = [str.maketrans("@4!305$7" + "1", "aaieosst" + letter) for letter in "il"]


class Lexicon:
    """Words and phrases; a text contains one if its words do, whole and in order.

    Case, compatibility forms and accents (Unicode NFKD), invisible characters, punctuation between words
    and digits or signs for letters (`1d10t`, `$cum`) make no difference. Misspellings, letters spaced out
    or borrowed from other alphabets, and meaning without these words are not seen.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        """Raises DataError for an entry without a letter or digit."""
        self._by_first_word: dict[str, list[tuple[str, ...]]] = {}
        for entry in entries:
            words = tuple(_PLAIN_WORD.findall(_fold(entry)))
            if not words:
                raise DataError(f"lexicon entry {entry!r}: has no letter or digit; remove it")
            self._by_first_word.setdefault(words[0], []).append(words)

    @classmethod
    def load(cls, path: Path = DEFAULT_PATH) -> Lexicon:
        """Read one entry a line, UTF-8; empty lines and lines that begin with `#` are skipped.

        Raises DataError if the file cannot be read or holds no entry.
        """
        try:
            lines = [line.strip() for line in read_text(path).splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"lexicon {path}: cannot be read as UTF-8 text ({error}); check the path"
            ) from error
        entries = [line for line in lines if line and not line.startswith("#")]
        if not entries:
            raise DataError(f"lexicon {path}: holds no entry; write one word or phrase a line")
        return cls(entries)

    def find(self, text: str) -> str | None:
        """The first entry that `text` contains, its words joined by spaces; None if there is none."""
        text = _fold(text)
        found = self._match(_PLAIN_WORD.findall(text))
        if found is None and _LEET_SIGN.search(text):
            words = _LEET_WORD.findall(text)
            for table in _LEET_TABLES:
                found = found or self._match([_unleet(word, table) for word in words])
        return found

    def _match(self, words: Sequence[str]) -> str | None:
        if self._by_first_word.keys().isdisjoint(words):
            return None
        for start, word in enumerate(words):
            for entry in self._by_first_word.get(word, ()):
                if tuple(words[start : start + len(entry)]) == entry:
                    return " ".join(entry)
        return None


def _unleet(word: str, table: dict[int, int]) -> str:
    """Numbers stay numbers, and closing exclamation marks what they are."""
    if word.isalpha():
        return word
    word = word.rstrip("!")
    return word.translate(table) if any(map(str.isalpha, word)) else word


def _fold(text: str) -> str:
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(
        char for char in decomposed if unicodedata.category(char) not in _ACCENT_OR_INVISIBLE
    ).casefold()
