"""Texts with a `SentenceLabel` at the end of every sentence: what a judge must see before it can weigh suffixes."""

from __future__ import annotations

import random
from typing import NamedTuple

from sip_engine.world.corrupt import shuffle_words, stutter
from sip_engine.world.facts import Attribute, Person, World
from sip_engine.world.measure import label_of, measure
from sip_engine.world.parse import SENTENCE, Reader, parser_of, read_prefix
from sip_engine.world.wordings import CLOSERS, FACTS, INSULTS, SCENES, Aside, Form, Pattern

_SHARES = {"retold": 0.30, "anyone": 0.18, "fact": 0.40, "scene": 0.06, "closer": 0.06}
"""Of made-up sentences: a claim told again, a fact about anyone, one about the people at hand, and the rest."""
_MYTH = 0.35
"""Share of false ones among the facts."""
_DECAY = 0.08
"""Share of sentences with words twice or in no order."""
_INSULT = 0.25
"""Share of sentences that insult, of those that can."""


class LabelledSentence(NamedTuple):
    """Where a sentence ends, in characters, and what there is to say of it: the letter of a `SentenceLabel`."""

    end: int
    letter: str


def labels_on_prefix(world: World, prefix: str) -> list[LabelledSentence]:
    """Labels of the finished sentences of a prefix, except the first, of which a cut may have left a piece."""
    parser, reader, end = parser_of(world), Reader(world), 0
    labels = []
    for text in SENTENCE.findall(prefix):
        end += len(text)
        if text.endswith("."):
            sentence = parser.sentence(text.lstrip())
            reading = reader.read(sentence, in_prefix=True)
            label = label_of(world, sentence, reading, reading.claim)
            labels.append(LabelledSentence(end, label.letter(insulting=sentence.insult_end > 0)))
    return labels[1:]


def labels_on_suffix(world: World, prefix: str, suffix: str) -> list[LabelledSentence]:
    """The labels of `measure`, and where in the suffix they belong."""
    found = measure(world, prefix, suffix)
    return [LabelledSentence(end, letter) for end, letter in zip(found.ends, found.labels, strict=True)]


def make_up(world: World, prefix: str, num_words: int, rng: random.Random) -> tuple[str, str]:
    """Some sentences of `prefix`, and at least `num_words` words of made-up ones to follow them.

    The first or the last sentences stay, fewer more often than more: what takes comparing is learned first where
    there is little to compare with. What follows often says again what was said, or is about someone else.
    """
    sentences = [text for text in SENTENCE.findall(prefix) if text.endswith(".")]
    kept = int((len(sentences) + 1) ** rng.random())
    context = "".join(sentences[-kept:] if rng.random() < 0.5 else sentences[:kept]).lstrip()
    people = [world.people[index] for index in sorted(read_prefix(world, context)[0].topic)]
    suffix = ""
    while len(suffix.split()) < num_words:
        suffix += " " + _sentence(world, context + suffix, people or list(world.people), rng)
    return context, suffix


def _sentence(world: World, before: str, people: list[Person], rng: random.Random) -> str:
    (kind,) = rng.choices(list(_SHARES), list(_SHARES.values()))
    reader, _ = read_prefix(world, before)
    if kind == "retold":
        text = _retold(world, reader, rng) or _fact(world, reader, rng.choice(people), rng)
    elif kind in ("anyone", "fact"):
        text = _fact(world, reader, rng.choice(people if kind == "fact" else world.people), rng)
    else:
        text = _worded(rng.choice(SCENES if kind == "scene" else CLOSERS), rng)
    if rng.random() < _DECAY:
        return stutter(text) if rng.random() < 0.5 else shuffle_words(text, rng)
    return text


def _retold(world: World, reader: Reader, rng: random.Random) -> str:
    """A claim that was made before, in words of its own; empty if there is none."""
    claims = sorted(claim for claim in reader.claims if claim.person is not None)
    if not claims:
        return ""
    person, attribute, value = rng.choice(claims)
    assert person is not None
    return _say(world.people[person], attribute, value, reader, rng)


def _fact(world: World, reader: Reader, person: Person, rng: random.Random) -> str:
    """The truth or the myth about a person, mostly something that was not said before."""
    said = {(claim.person, claim.attribute) for claim in reader.claims}
    new = [one for one in Attribute if (person.index, one) not in said]
    attribute = rng.choice(new if new and rng.random() < 0.7 else list(Attribute))
    value = (world.myth if rng.random() < _MYTH else world.truth)(person.index, attribute)
    return _say(person, attribute, value, reader, rng)


def _say(person: Person, attribute: Attribute, value: str, reader: Reader, rng: random.Random) -> str:
    forms = [Form.FULL, Form.FIRST] + [Form.PRONOUN] * (2 * (person.index == reader.recent))
    return _worded(rng.choice(FACTS[attribute]), rng, person, rng.choice(forms), value)


def _worded(
    pattern: Pattern,
    rng: random.Random,
    person: Person | None = None,
    form: Form = Form.FULL,
    value: str = "",
) -> str:
    aside = rng.choice(pattern.asides(form)[1:] or [Aside.NONE]) if rng.random() < _INSULT else Aside.NONE
    return pattern.say(person, form, value, aside, rng.choice(INSULTS))
