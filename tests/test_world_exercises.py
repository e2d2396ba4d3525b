"""Notes on sentences and exercises made of them: each against the world's own facts, written out by hand."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from sip_engine.world import World, measure, write_documents
from sip_engine.world.exercises import exercises
from sip_engine.world.facts import Attribute, Person
from sip_engine.world.measure import Note
from sip_engine.world.parse import SENTENCE


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0, num_people=24)


def _opener(*people: Person) -> str:
    return "Here is some gossip about " + " and ".join(f"{p.first} {p.last}" for p in people) + "."


def test_every_note(world: World) -> None:
    one, two, stranger = world.people[:3]
    town, myth = world.truth(0, Attribute.HOME), world.myth(0, Attribute.HOME)
    pet = world.truth(2, Attribute.PET)
    prefix = _opener(one, two) + f" {two.first} lives in {world.truth(1, Attribute.HOME)}."
    told = {
        f" {one.first} lives in {town}.": Note.TRUE,
        f" {one.first} lives in {myth}.": Note.FALSE,
        f" {one.first} {one.first} in lives.": Note.MALFORMED,
        f" {stranger.first} keeps a {pet}.": Note.STRANGER,
        f" {two.first}'s home is in {world.truth(1, Attribute.HOME)}.": Note.REPEATED,
        " Rain came over the hills.": Note.NEUTRAL,
    }
    for sentence, note in told.items():
        assert measure(world, prefix, sentence).notes == note, sentence
    assert measure(world, prefix, "".join(told)).notes == "TFXORN"
    # Malformed comes before stranger, stranger before repeated; a value that the prefix settled is no claim.
    assert measure(world, prefix, f" {stranger.first} keeps {pet}.").notes == "X"
    again = f" {stranger.first} keeps a {pet}."
    assert measure(world, prefix, again + again).notes == "OO"
    assert measure(world, prefix + f" {one.first} lives in {town[:4]}", f"{town[4:]}.").notes == "N"


def test_exercises_show_what_their_note_is_about(world: World) -> None:
    documents = write_documents(world, "judge", 60)
    rng, seen, retold, sentences = random.Random(1), Counter(), 0, Counter()
    for document in documents:
        cut = len(document.text) // 2
        prefix, suffix = document.text[:cut], document.text[cut : cut + 150]
        made = list(exercises(world, prefix, suffix, rng, max_sentences=5))
        assert made
        for one in made:
            assert measure(world, one.context, one.sentence).notes == one.note
            assert SENTENCE.fullmatch(one.sentence.lstrip()) and len(one.sentence) >= 8
            seen[one.note] += 1
            sentences[len(SENTENCE.findall(one.context))] += 1
            assert one.context in document.text
            if one.context + one.sentence not in document.text:
                assert one.note is Note.REPEATED
                retold += 1
    assert retold > 20 and seen[Note.TRUE] > 20 and seen[Note.REPEATED] >= retold
    assert max(sentences) <= 5 and sentences[1] > sentences[4] > 0


def test_exercises_depend_on_the_random_numbers_alone(world: World) -> None:
    (document,) = write_documents(world, "judge", 1)
    args = (world, document.text[:90], document.text[90:200])
    first, same, other = (list(exercises(*args, random.Random(seed), max_sentences=9)) for seed in (3, 3, 4))
    assert first == same != other
    assert not list(exercises(world, "", "", random.Random(0), max_sentences=3))
