"""From text back to sentences and claims: a trie of the wordings, and a reader that keeps the context."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import NamedTuple

from sip_engine.world.facts import GROUP_SIZE, PETS, SURNAMES, TOWNS, TRADES, YEARS, Attribute, Gender, World
from sip_engine.world.wordings import INSULTS, PATTERNS, PRAISES, PRONOUNS, Aside, Form, Pattern

SENTENCE = re.compile(r"[^.]*\.|[^.]+")
"""Finds the sentences of a text, the unfinished last one too; joined they are the text again."""
INSULT = re.compile("|".join(INSULTS))
"""An insult in lower-cased text, inside a longer word as well."""
TOKEN = re.compile(r"\w+|'s|[^\w\s]")
_PATTERN_TOKEN = re.compile(r"\{\w+\}|\w+|[^\w\s]")

VALUE_CLASS = {
    Attribute.BIRTHPLACE: "<town>",
    Attribute.BIRTH_YEAR: "<year>",
    Attribute.TRADE: "<trade>",
    Attribute.HOME: "<town>",
    Attribute.PET: "<pet>",
}
_NOUNS = frozenset(PRAISES + INSULTS)
GENDER_OF = {word: gender for gender, words in PRONOUNS.items() for word in words.values()}


class Node:
    """One place in the trie: the words that can follow, and what has been said so far."""

    __slots__ = ("attribute", "end", "next")

    def __init__(self) -> None:
        self.next: dict[str, Node] = {}
        self.attribute: Attribute | None = None
        """Set where the word just read is a value."""
        self.end: tuple[Pattern, Form, Aside] | None = None
        """Set where the sentence may end."""


def _slot_tokens(form: Form, gender: Gender) -> dict[str, list[str]]:
    """Trie tokens for the person slots of a pattern."""
    pronouns = {slot: [word] for slot, word in PRONOUNS[gender].items()}
    if form is Form.PRONOUN:
        return pronouns
    name = ["<first>", "<last>"] if form is Form.FULL else ["<first>"]
    possessive = [*name, "'s"]
    return pronouns | {"They": name, "they": name, "them": name, "Their": possessive, "their": possessive}


def _token_sequences(pattern: Pattern) -> Iterator[tuple[list[str], Form, Aside]]:
    """Every token sequence that a pattern can be worded as."""
    full = ["<first>", "<last>"]
    more = [",", *full]
    lists = (
        [[*full, *more * (number - 2), "and", *full] for number in range(2, GROUP_SIZE + 1)]
        if "{people}" in pattern.text
        else [[]]
    )
    value = [VALUE_CLASS[pattern.attribute]] if pattern.attribute else []
    for form in pattern.forms():
        for aside in pattern.asides(form):
            tokens = _PATTERN_TOKEN.findall(pattern.with_aside(aside))
            for gender in Gender:
                for people in lists:
                    slots = _slot_tokens(form, gender) | {
                        "value": value,
                        "noun": ["<noun>"],
                        "people": people,
                    }
                    parts = (slots[token[1:-1]] if token[0] == "{" else [token] for token in tokens)
                    yield [word for part in parts for word in part], form, aside


@cache
def _trie() -> Node:
    """The trie of all patterns; the same for every world."""
    root = Node()
    for pattern in PATTERNS:
        for tokens, form, aside in _token_sequences(pattern):
            node = root
            for token in tokens:
                node = node.next.setdefault(token, Node())
                if pattern.attribute and token == VALUE_CLASS[pattern.attribute]:
                    assert node.attribute in (None, pattern.attribute), f"ambiguous wording: {pattern.text}"
                    node.attribute = pattern.attribute
            assert node.end in (None, (pattern, form, aside)), f"ambiguous wording: {pattern.text}"
            node.end = (pattern, form, aside)
    return root


class Value(NamedTuple):
    """A value named in a sentence, with its character offsets there."""

    attribute: Attribute
    word: str
    start: int
    end: int


class Sentence(NamedTuple):
    """What can be said about one sentence without its context."""

    text: str
    words: tuple[str, ...]
    """Words and punctuation, without the full stop."""
    closed: bool
    """Whether it ends with a full stop."""
    sound: bool
    """Closed: well-formed. Otherwise: it can be continued into a well-formed sentence."""
    people: tuple[int, ...]
    """Everyone named, in order."""
    gender: Gender | None
    """Of the pronouns in it."""
    value: Value | None
    """Of the claim it makes, where the wording is grammatical up to there."""
    wording: tuple[Pattern, Form, Aside] | None
    """Of a sound, closed sentence."""
    insult_end: int
    """Character offset just behind its last insult; 0 without one."""

    @property
    def gist(self) -> tuple[str, ...]:
        """The words, the same for all nouns and, where it is sound and closed, with and without an aside."""
        ends_in_aside = self.wording is not None and self.wording[2] is Aside.AT_END
        words = self.words[:-3] if ends_in_aside else self.words
        return tuple("<noun>" if word in _NOUNS else word for word in words)


class Claim(NamedTuple):
    """That a person's attribute has a value; `person` is None when nobody can tell whom it is about."""

    person: int | None
    attribute: Attribute
    value: str


class Parser:
    """Reads single sentences of one world; remembers the sentences it met last."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.root = _trie()
        self.first_names = {person.first: person for person in world.people}
        self.members: dict[str, tuple[str, ...]] = {
            "<first>": tuple(self.first_names),
            "<last>": SURNAMES,
            "<town>": TOWNS,
            "<year>": YEARS,
            "<trade>": TRADES,
            "<pet>": PETS,
            "<noun>": PRAISES + INSULTS,
        }
        self._class_of = {word: name for name, words in self.members.items() for word in words}
        self.sentence = lru_cache(maxsize=1 << 15)(self._sentence)

    def step(self, node: Node, word: str) -> Node | None:
        """The place in the trie after one more word; None where the word does not fit."""
        return node.next.get(word) or node.next.get(self._class_of.get(word, ""))

    def walk(self, words: Sequence[str]) -> list[Node]:
        """The places in the trie from its root on, as far as `words` lead."""
        path = [self.root]
        for word in words:
            if (node := self.step(path[-1], word)) is None:
                break
            path.append(node)
        return path

    def fits_fragment(self, node: Node, fragment: str) -> bool:
        """Whether a harmless word that begins with `fragment` can come next."""
        for token in node.next:
            words = (token,) if token[0] != "<" else PRAISES if token == "<noun>" else self.members[token]
            if any(word.startswith(fragment) for word in words):
                return True
        return False

    def _sentence(self, text: str) -> Sentence:
        matches = list(TOKEN.finditer(text))
        if closed := text.endswith("."):
            matches.pop()
        words = tuple([match[0] for match in matches])
        last_is_whole = closed or text[-1:].isspace()
        path = self.walk(words)
        node, num_read, value = path[-1], len(path) - 1, None
        for place, match in zip(path[1:], matches, strict=False):
            if place.attribute is not None:
                value = Value(place.attribute, match[0], match.start(), match.end())
        if num_read < len(words):
            in_last_word = num_read == len(words) - 1 and not last_is_whole
            grammatical = in_last_word and self.fits_fragment(node, words[-1])
        else:
            grammatical = bool(words) and (not closed or node.end is not None)
        people, misnamed, gender = self._name_words(words, len(words) if last_is_whole else len(words) - 1)
        sound = grammatical and not misnamed and is_spaced_well(text, words)
        return Sentence(
            text=text,
            words=words,
            closed=closed,
            sound=sound,
            people=tuple(people),
            gender=gender,
            value=value if grammatical else None,
            wording=node.end if sound and closed else None,
            insult_end=max([match.end() for match in INSULT.finditer(text.lower())], default=0),
        )

    def _name_words(self, words: tuple[str, ...], num_whole: int) -> tuple[list[int], bool, Gender | None]:
        """Everyone named, whether someone bears another's surname, and the first whole pronoun's gender."""
        people, misnamed, gender = [], False, None
        for position, word in enumerate(words):
            if person := self.first_names.get(word):
                people.append(person.index)
                after = words[position + 1] if position + 1 < len(words) else ""
                is_own = after == person.last if position + 1 < num_whole else person.last.startswith(after)
                # Of all that can follow a first name, surnames alone have a capital.
                misnamed = misnamed or (after[:1].isupper() and not is_own)
            elif gender is None and position < num_whole:
                gender = GENDER_OF.get(word)
        return people, misnamed, gender

    def is_decided(self, value: Value, cut: int) -> bool:
        """Whether the text before `cut` leaves no choice of the value (see the word lists in `facts`)."""
        if value.end <= cut:
            return True
        fragment = value.word[: max(0, cut - value.start)]
        return sum(word.startswith(fragment) for word in self.members[VALUE_CLASS[value.attribute]]) == 1


def is_spaced_well(text: str, words: Sequence[str]) -> bool:
    """Whether nothing but single spaces stands between the words of a sentence (and after the last)."""
    spaced = join_words(words)
    return text in (spaced, spaced + ".", spaced + " ")


def join_words(words: Sequence[str]) -> str:
    """Words and punctuation as running text."""
    return "".join(word if word in (",", "'", "'s") else f" {word}" for word in words).removeprefix(" ")


@lru_cache(maxsize=8)
def parser_of(world: World) -> Parser:
    """The parser of a world, built once."""
    return Parser(world)


class Reading(NamedTuple):
    """A sentence understood in its context."""

    person: int | None
    """Whom it is about, where that can be told."""
    claim: Claim | None
    follows: bool
    """Its pronouns have someone to stand for and it stays with the people of the document."""
    repeated: bool
    """The same claim came before; the same gist, if it makes none."""


@dataclass
class Reader:
    """Reads sentences one by one and remembers who was named, what was claimed and what was said."""

    world: World
    topic: set[int] = field(default_factory=set)
    recent: int | None = None
    """The person named last: what a pronoun stands for."""
    claims: set[Claim] = field(default_factory=set)
    said: set[tuple[int | None, tuple[str, ...]]] = field(default_factory=set)
    """The gist of every finished sentence, with the person that its pronouns stand for."""

    def copy(self) -> Reader:
        """An independent reader with the same memory."""
        return Reader(self.world, set(self.topic), self.recent, set(self.claims), set(self.said))

    def read(self, sentence: Sentence, *, in_prefix: bool = False) -> Reading:
        """Understand one sentence and remember it.

        The prefix (and the first sentence, wherever it is cut) says who the document's people are.
        """
        if sentence.people:
            self.recent = sentence.people[-1]
            if in_prefix or not self.topic or not self.said:
                self.topic.update(sentence.people)
        person = self.recent
        if sentence.gender and (person is None or self.world.people[person].gender is not sentence.gender):
            person = None
        claim, saying = None, (person if sentence.gender else None, sentence.gist)
        if sentence.value:
            certain = person is not None and sentence.sound
            claim = Claim(person if certain else None, sentence.value.attribute, sentence.value.word)
            repeated = claim in self.claims
            self.claims.add(claim)
        else:
            repeated = saying in self.said
        if sentence.closed:
            self.said.add(saying)
        follows = self.topic.issuperset(sentence.people) and (person is not None or not sentence.gender)
        return Reading(person, claim, follows, repeated)


@lru_cache(maxsize=1 << 12)
def _read_prefix(world: World, prefix: str) -> tuple[Reader, str]:
    parser, reader, begun = parser_of(world), Reader(world), ""
    for text in SENTENCE.findall(prefix):
        if text.endswith("."):
            reader.read(parser.sentence(text.lstrip()), in_prefix=True)
        else:
            begun = text
    if begun:
        reader.topic.update(parser.sentence(begun.lstrip()).people)
    return reader, begun


def read_prefix(world: World, prefix: str) -> tuple[Reader, str]:
    """A reader that has read the finished sentences of `prefix`, and the sentence that it leaves begun."""
    reader, begun = _read_prefix(world, prefix)
    return reader.copy(), begun
