"""Well-formed endings of a begun sentence, found by walking on in the trie of the wordings."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sip_engine.world.parse import GENDER_OF, TOKEN, Node, Parser, join_words
from sip_engine.world.wordings import PRAISES


def find_endings(
    parser: Parser, head: str, people: Sequence[int], recent: int | None, rng: random.Random
) -> Iterator[str]:
    """Texts, full stop included, that make `head` a well-formed sentence about some of `people`.

    In random order, without insults, and true wherever `head` leaves the choice. `recent` is the person
    that a pronoun stands for. Nothing comes where `head` cannot be finished.
    """
    words = TOKEN.findall(head)
    path = parser.walk(words)
    named = [parser.first_names[word].index for word in words if word in parser.first_names]
    search = _Search(parser, people, rng)
    person = named[-1] if named else recent
    ends_apart = not head or head[-1].isspace()
    if len(path) == len(words) + 1:
        for more in search.walks(path[-1], "", person):
            text = join_words(more)
            if text[:1].isalnum():
                yield ("" if ends_apart else " ") + text + "."
            elif not ends_apart:  # commas and full stops stand close to the word before them
                yield text + "."
    if not ends_apart and len(path) >= len(words):
        fragment = words[-1]
        for more in search.walks(path[len(words) - 1], fragment, person):
            yield join_words(more)[len(fragment) :] + "."


@dataclass(frozen=True)
class _Search:
    """What stays the same while walking the trie."""

    parser: Parser
    people: Sequence[int]
    rng: random.Random

    def walks(self, node: Node, fragment: str, person: int | None) -> Iterator[list[str]]:
        """Words from `node` to where a sentence may end; the first of them begins with `fragment`."""
        if node.end and not fragment:
            yield []
        for token, after in self.rng.sample(list(node.next.items()), len(node.next)):
            for word in self.choices(token, after, fragment, person):
                about = self.parser.first_names[word].index if token == "<first>" else person
                for more in self.walks(after, "", about):
                    yield [word, *more]

    def choices(self, token: str, after: Node, fragment: str, person: int | None) -> list[str]:
        """The words to take for one token of the trie; values are true unless `fragment` forbids it."""
        known = None if person is None else self.parser.world.people[person]
        if token == "<first>":
            people = self.rng.sample(self.people, len(self.people))
            words = [self.parser.world.people[index].first for index in people]
        elif token == "<noun>":
            words = [self.rng.choice([word for word in PRAISES if word.startswith(fragment)] or [""])]
        elif token == "<last>":
            words = [known.last] if known else []
        elif after.attribute:
            true = self.parser.world.truth(known.index, after.attribute) if known else None
            words = [true] if true and true.startswith(fragment) else self.parser.members[token]
        else:
            fits = known is None or GENDER_OF.get(token, known.gender) is known.gender
            words = [token] if fits else []
        return [word for word in words if word and word.startswith(fragment)]
