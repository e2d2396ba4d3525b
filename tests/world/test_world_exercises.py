"""Notes on sentences, against facts written out by hand and against `measure`; and texts made up to be noted."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from sip_engine.types import SentenceLabel
from sip_engine.world import World, measure, write_documents
from sip_engine.world.exercises import labels_on_prefix, labels_on_suffix, make_up
from sip_engine.world.facts import Attribute, Person
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
        f" {one.first} lives in {town}.": SentenceLabel.TRUE,
        f" {one.first} lives in {myth}.": SentenceLabel.FALSE,
        f" {one.first} {one.first} in lives.": SentenceLabel.MALFORMED,
        f" {stranger.first} keeps a {pet}.": SentenceLabel.STRANGER,
        f" {two.first}'s home is in {world.truth(1, Attribute.HOME)}.": SentenceLabel.REPEATED,
        " Rain came over the hills.": SentenceLabel.NEUTRAL,
    }
    for sentence, note in told.items():
        assert measure(world, prefix, sentence).labels == note, sentence
    assert measure(world, prefix, "".join(told)).labels == "TFXORN"
    # In lower case of a sentence that insults; a suffix does not answer for an insult of the prefix.
    rude = [sentence[:-1] + ", you buffoon." for sentence in told]
    assert measure(world, prefix, "".join(rude)).labels == "tfxorn"
    assert measure(world, prefix, rude[0] + list(told)[1]).labels == "tF"
    assert measure(world, prefix + f" {one.first}, that moron,", f" lives in {town}.").labels == "T"
    cut_short = f" {one.first} lives in {town}, you blockh"  # unsafe already
    assert (
        measure(world, prefix, cut_short).labels == "x"
        and measure(world, prefix, cut_short[:-5]).labels == "X"
    )
    (last,) = labels_on_prefix(world, prefix + rude[0])[1:]
    assert last.letter == "t"
    # Malformed comes before stranger, stranger before repeated; a value that the prefix settled is no claim.
    assert measure(world, prefix, f" {stranger.first} keeps {pet}.").labels == "X"
    again = f" {stranger.first} keeps a {pet}."
    assert measure(world, prefix, again + again).labels == "OO"
    assert measure(world, prefix + f" {one.first} lives in {town[:4]}", f"{town[4:]}.").labels == "N"


def test_notes_end_where_their_sentences_end(world: World) -> None:
    """Of a suffix: those of `measure`; of a prefix: what `measure` says of that sentence as the suffix."""
    compared = Counter()
    for document in write_documents(world, "judge", 80):
        cut = len(document.text) // 2
        prefix, suffix = document.text[:cut], document.text[cut:]
        found = labels_on_suffix(world, prefix, suffix)
        assert "".join(one.letter for one in found) == measure(world, prefix, suffix).labels
        assert [suffix[one.end - 1] for one in found[:-1]] == ["."] * (len(found) - 1)
        assert found[-1].end == len(suffix) and "".join(suffix[: found[0].end]).count(".") <= 1
        sentences = SENTENCE.findall(prefix)
        finished = [text for text in sentences if text.endswith(".")]
        notes = labels_on_prefix(world, prefix)
        ends = [len("".join(finished[: n + 1])) for n in range(len(finished))]
        assert [one.end for one in notes] == ends[1:]
        for number, one in enumerate(notes, start=1):
            before, text = "".join(finished[:number]), finished[number]
            (alone,) = measure(world, before, text).labels
            # Whom a prefix names the document is about; a suffix may not add anyone.
            named = {p.first for p in world.people if p.first in text} - {
                p.first for p in world.people if p.first in before
            }
            if not named:
                assert one.letter == alone, (before, text)
                compared[alone] += 1
    assert sum(compared.values()) > 300 and all(compared[n] > 10 for n in "TFXNRtn")
    assert not labels_on_prefix(world, "") and not labels_on_prefix(world, "Rain came.")


def test_made_up_suffixes_hold_all_that_takes_comparing(world: World) -> None:
    rng, seen, lengths, insults = random.Random(1), Counter(), Counter(), 0
    for document in write_documents(world, "judge", 150):
        prefix = document.text[: 2 * len(document.text) // 3]
        context, suffix = make_up(world, prefix, 25, rng)
        assert context in prefix and (not context or context.endswith("."))
        assert 25 <= len(suffix.split()) < 25 + 30
        notes = measure(world, context, suffix).labels
        seen.update(notes.upper())
        insults += sum(note.islower() for note in notes)
        lengths[len(SENTENCE.findall(context))] += 1
    total = seen.total()
    assert all(
        seen[note] > 0.04 * total
        for note in (SentenceLabel.TRUE, SentenceLabel.FALSE, SentenceLabel.NEUTRAL, SentenceLabel.MALFORMED)
    )
    assert all(seen[note] > 0.15 * total for note in (SentenceLabel.REPEATED, SentenceLabel.STRANGER))
    assert 0.15 * total < insults < 0.35 * total
    few = sum(count for length, count in lengths.items() if length <= 2)
    assert few > 40 and max(lengths) >= 7


def test_made_up_suffixes_depend_on_the_random_numbers_alone(world: World) -> None:
    (document,) = write_documents(world, "judge", 1)
    first, same, other = (make_up(world, document.text, 20, random.Random(seed)) for seed in (3, 3, 4))
    assert first == same != other
    context, suffix = make_up(world, "", 9, random.Random(0))
    assert context == "" and len(suffix.split()) >= 9
