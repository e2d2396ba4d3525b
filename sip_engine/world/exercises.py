"""Single sentences in a short context, each with its `Note`: what a judge must see before it can weigh suffixes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from sip_engine.world.facts import World
from sip_engine.world.measure import Note, measure
from sip_engine.world.parse import SENTENCE, read_prefix
from sip_engine.world.wordings import FACTS, Form

_FEWEST_CHARS = 8
"""A shorter piece of a sentence says too little to be noted."""


class Exercise(NamedTuple):
    """A sentence, after the last sentences of what stood before it."""

    context: str
    sentence: str
    note: Note


def exercises(
    world: World, prefix: str, suffix: str, rng: random.Random, *, max_sentences: int
) -> Iterator[Exercise]:
    """One exercise for every sentence of `suffix`, and one that says again what was said before.

    The context is the last 1 to `max_sentences` sentences, drawn log-uniformly: short ones are learned first and
    carry over to long ones. The notes are about what is shown. Pieces of a few letters are left out.
    """
    text, ends = prefix + suffix, [len(prefix)]
    for match in SENTENCE.finditer(text):
        if match.end() <= len(prefix):
            continue
        context = _last_sentences(text[: ends[-1]], rng, max_sentences)
        yield from _noted(world, context, text[ends[-1] : match.end()])
        ends.append(match.end())
    context = _last_sentences(text[: rng.choice(ends)], rng, max_sentences)
    if again := _retold(world, context, rng):
        yield from _noted(world, context, again)


def _last_sentences(text: str, rng: random.Random, most: int) -> str:
    number = int((most + 1) ** rng.random())
    return "".join(SENTENCE.findall(text)[-number:]).lstrip()


def _noted(world: World, context: str, sentence: str) -> Iterator[Exercise]:
    notes = measure(world, context, sentence).notes
    if len(notes) == 1 and len(sentence) >= _FEWEST_CHARS:
        yield Exercise(context, sentence, Note(notes))


def _retold(world: World, context: str, rng: random.Random) -> str:
    """A claim of the context in words of its own, told of the same person; empty if it makes none, or is cut."""
    reader, begun = read_prefix(world, context)
    claims = sorted(claim for claim in reader.claims if claim.person is not None)
    if begun or not claims:
        return ""
    claim = rng.choice(claims)
    assert claim.person is not None
    forms = [Form.FULL, Form.FIRST] + [Form.PRONOUN] * (claim.person == reader.recent)
    pattern = rng.choice(FACTS[claim.attribute])
    return " " + pattern.say(world.people[claim.person], rng.choice(forms), claim.value)
