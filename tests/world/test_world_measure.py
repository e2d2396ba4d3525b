"""The world's measures: the truth by hand, sentences against their patterns, and no way to fool them."""

from __future__ import annotations

import random
import re
from itertools import product
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sip_engine.data.tokenizer import Tokenizer
from sip_engine.world import Document, Measures, Shares, World, measure, write_documents
from sip_engine.world.facts import VALUES, Attribute, Gender
from sip_engine.world.measure import count_insults, is_safe
from sip_engine.world.parse import SENTENCE, Parser, Value, parser_of, read_prefix
from sip_engine.world.wordings import (
    CLOSERS,
    FACTS,
    INSULTS,
    PATTERNS,
    PRAISES,
    REMARKS,
    SCENES,
    Aside,
    Form,
    Part,
    list_names,
)

WORLD = World(seed=0, num_people=24)
CLEAN = Shares(unreliable=0, abusive=0, degenerate=0)
ANN, BOB = (next(p for p in WORLD.people if p.gender is gender) for gender in (Gender.SHE, Gender.HE))
OPENER = f"The town record tells of {ANN.name} and {BOB.name}."


def true(person: int, attribute: Attribute) -> str:
    return WORLD.truth(person, attribute)


def wrong(person: int, attribute: Attribute) -> str:
    return WORLD.myth(person, attribute)


def judged(suffix: str, prefix: str = OPENER) -> Measures:
    return measure(WORLD, prefix, suffix)


HOME = true(ANN.index, Attribute.HOME)
PET = true(ANN.index, Attribute.PET)
WRONG_PET = wrong(ANN.index, Attribute.PET)
TRADE = true(BOB.index, Attribute.TRADE)


@pytest.mark.parametrize(
    ("suffix", "coherence", "claims", "truths"),
    [
        (f" {ANN.first} lives in {HOME}. She keeps a {PET}. By trade {BOB.first} is a {TRADE}.", 1, 3, 3),
        (f" {ANN.first} lives in {HOME}. She keeps a {WRONG_PET}.", 1, 2, 1),
        (" Rain came over the hills. Nothing more is known today.", 1, 0, 0),
        (f" {ANN.first} lives in {HOME}. Her home is in {HOME}.", 0.5, 1, 1),  # the same in other words
        (f" {ANN.first} keeps a {PET}. {ANN.first} keeps a {WRONG_PET}.", 1, 2, 1),  # both at once
        (f" {ANN.first} lives lives in {HOME}.", 0, 0, 0),
        (f" in {HOME} lives {ANN.first}.", 0, 0, 0),
        (f" {ANN.first} lives in {PET}.", 0, 0, 0),  # a word of the wrong kind
        (f" {ANN.first} Sutterby lives in {HOME}.", 0, 0, 0),  # nobody's surname
        (
            f" {ANN.first} {BOB.last} lives in {HOME}.",
            0,
            1,
            0,
        ),  # another's surname: nobody knows who is meant
        (f" {WORLD.people[9].first} lives in {HOME}.", 0, 1, None),  # not of this document
        (
            f" {BOB.first} walks. At night she walks a {PET}.",
            0,
            1,
            0,
        ),  # a pronoun without anyone to stand for
    ],
)
def test_sentences_by_hand(suffix: str, coherence: float, claims: int, truths: int | None) -> None:
    found = judged(suffix)
    assert found.coherence == pytest.approx(coherence, abs=0.04)
    assert found.num_claims == claims
    if truths is not None:
        assert found.num_true == truths
    if claims == truths == 0:
        assert found.factuality == 0.0


def test_a_pronoun_stands_for_the_one_named_last() -> None:
    keeps = f" He keeps a {true(BOB.index, Attribute.PET)}."
    assert judged(keeps).num_true == 1
    assert judged(keeps, f"{OPENER} {ANN.first} lives in {HOME}.").num_true == 0
    assert judged(keeps, f"{OPENER} {ANN.first} lives in {HOME}.").coherence == 0.0


def test_what_was_told_before_earns_nothing() -> None:
    told = f"{OPENER} {ANN.first} keeps a {PET}."
    again = judged(f" Her pet is a {PET}.", told)
    assert (again.coherence, again.num_claims, again.quality) == (0.0, 0, 0.0)
    # A false claim stays false however often it is told; the truth may still be told.
    told = f"{OPENER} {ANN.first} keeps a {WRONG_PET}."
    assert judged(f" Her pet is a {WRONG_PET}.", told).factuality == 0.0
    assert judged(f" Her pet is a {WRONG_PET}.", told).num_claims == 1
    corrected = judged(f" Her pet is a {PET}.", told)
    assert corrected.coherence == corrected.factuality == 1.0


def test_a_kind_word_more_or_less_makes_nothing_new() -> None:
    scene, again = "Rain came over the hills", " Rain came over the hills, you jewel."
    assert judged(again, f"{OPENER} {scene}.").coherence == 0.0
    assert judged(again, f"{OPENER} {scene}, you genius.").coherence == 0.0
    assert judged(f" {scene}.", f"{OPENER} {scene}, you genius.").coherence == 0.0
    assert judged(again, OPENER).coherence == 1.0


def test_the_prefix_decides_whom_a_document_is_about() -> None:
    other = WORLD.people[9]
    assert judged(f" {other.first} is a jewel.").coherence == 0.0
    assert judged(" is a jewel.", f"{OPENER} {other.first}").coherence == 1.0
    assert judged(f" {other.first} is a jewel.", "").coherence == 1.0
    # The first sentence says it, on whichever side of the cut its names are.
    head = f"The town record tells of {ANN.name}"
    assert judged(f" and {other.name}. {other.first} is a jewel.", head).coherence == 1.0


def test_quality_ranks_truth_above_silence_above_nonsense() -> None:
    first, second = f" {ANN.first} lives in {HOME}.", f" By trade {BOB.first} is a {TRADE}."
    lie = f" {ANN.first} keeps a {WRONG_PET}."
    scenes = "".join(f" {pattern.say()}" for pattern in SCENES[:2])
    ranked = [
        first + second,
        first + lie,
        scenes,
        first[: len(first) // 2] + "." + second[: len(second) // 2] + ". Rain came over the hills.",
        first.upper() + second.upper(),
    ]
    qualities = [judged(text).quality for text in ranked]
    assert qualities == sorted(qualities, reverse=True) and len(set(qualities)) == len(ranked)
    assert qualities[0] == 1.0 and qualities[-1] == 0.0
    # To say something wrong is no better than to say nothing.
    lies = f"{lie} {ANN.first} works as a {wrong(ANN.index, Attribute.TRADE)}."
    assert judged(lies).quality <= judged(scenes).quality


def test_insults_cost_civility_and_safety_only() -> None:
    polite, rude = f" {ANN.first} lives in {HOME}.", f" {ANN.first} lives in {HOME}, you dunce."
    a, b = judged(polite), judged(rude)
    assert (a.safety, b.safety, b.num_insults) == (1.0, 0.0, 1)
    assert (a.coherence, a.factuality) == (b.coherence, b.factuality) == (1.0, 1.0)
    assert b.quality < a.quality


# --- sentences against their patterns -------------------------------------------------------------------


def every_sentence() -> list[tuple[str, Part, Form, Aside, Attribute | None, str]]:
    """Each pattern in each form with each aside, about a woman and about a man."""
    said = []
    rng = random.Random(0)
    for pattern, person in product(PATTERNS, (ANN, BOB)):
        for form in pattern.forms():
            for aside in pattern.asides(form):
                value = rng.choice(VALUES[pattern.attribute]) if pattern.attribute else ""
                people = list_names([ANN, BOB, WORLD.people[9]][: rng.choice((2, 3))])
                text = pattern.say(person, form, value, aside, rng.choice(PRAISES), people)
                said.append((text, pattern.part, form, aside, pattern.attribute, value))
    return said


def test_every_sentence_is_read_as_it_was_written() -> None:
    parser = parser_of(WORLD)
    for text, part, form, aside, attribute, value in every_sentence():
        found = parser.sentence(text)
        assert found.sound and found.closed, text
        assert found.wording is not None
        assert (found.wording[0].part, found.wording[1:]) == (part, (form, aside)), text
        assert (found.value and found.value[:2]) == ((attribute, value) if attribute else None), text
        if found.value:
            assert text[found.value.start : found.value.end] == value
        assert found.insult_end == 0


def test_every_beginning_of_a_sentence_is_sound_and_no_spoilt_one_is() -> None:
    parser = parser_of(WORLD)
    for text, *_ in every_sentence()[::3]:
        assert all(parser.sentence(text[:size]).sound for size in range(1, len(text))), text
        words = text[:-1].split()
        for spoilt in (
            text[1:],
            text.replace(" ", "  ", 1),
            f"{words[0]} {text}",
            " ".join(words[::-1]) + ".",
        ):
            assert not parser.sentence(spoilt).sound, spoilt


@pytest.mark.parametrize("insult", INSULTS)
def test_the_beginning_of_an_insult_is_no_sound_ending(insult: str) -> None:
    parser = parser_of(WORLD)
    assert not any(
        parser.sentence(f"Listen well, you {insult[:size]}").sound for size in range(1, len(insult))
    )
    assert parser.sentence(f"Listen well, you {insult}.").sound


def test_a_value_is_decided_as_soon_as_no_other_begins_alike() -> None:
    parser = parser_of(WORLD)
    for attribute, words in VALUES.items():
        for word, size in product(words, range(6)):
            piece = word[:size]
            others = [other for other in words if other != word and other.startswith(piece)]
            value = Value(attribute, word, 10, 10 + len(word))
            assert parser.is_decided(value, 10 + size) == (not others), (word, size)


def test_whole_documents_against_their_sentences() -> None:
    """An independent count: patterns as regular expressions, on documents that keep to one habit."""
    by_value = {word: attribute for attribute, words in VALUES.items() for word in words}
    for doc in write_documents(WORLD, "test", 150, seed=5, shares=Shares(abusive=0, degenerate=0)):
        opener, _, rest = doc.text.partition(".")
        found = measure(WORLD, opener + ".", rest)
        values = [word for word in re.findall(r"\w+", rest) if word in by_value]
        assert found.num_claims == len(values)  # nothing is told twice
        assert (found.num_true == len(values)) or doc.unreliable
        assert found.factuality == pytest.approx(found.num_true / len(values))
        assert found.coherence == found.safety == 1.0
        assert found.num_sentences == rest.count(".") and found.num_words == len(rest.split())


# --- cuts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [doc.text for doc in write_documents(WORLD, "train", 400)]
    path: Path = tmp_path_factory.mktemp("tokenizer") / "model"
    return Tokenizer.train(texts, 512, path)


def clean_documents(count: int) -> list[Document]:
    return list(write_documents(WORLD, "test", count, seed=6, shares=CLEAN))


def test_good_text_is_good_wherever_it_is_cut(tokenizer: Tokenizer) -> None:
    """Cuts between tokens, many of them inside words; the prefix may lack the document's beginning."""
    inside = 0
    for doc in clean_documents(60):
        ids = tokenizer.encode(doc.text)
        for cut in range(30, len(ids) - 7, 7):
            prefix = tokenizer.decode(ids[:cut])
            for size in (5, 13, 40):
                suffix = tokenizer.decode(ids[cut : cut + size])
                found = measure(WORLD, prefix, suffix)
                assert found.coherence == found.safety == 1.0, (prefix, suffix)
                assert found.factuality == 1.0 or found.num_claims == 0, (prefix, suffix)
                inside += doc.text[len(prefix) - 1 : len(prefix) + 1].isalnum()
    assert inside > 300


def test_text_is_not_worse_for_being_cut_off() -> None:
    """The words after the last full stop cost next to nothing: they dilute the claims, and that is all."""
    for doc in clean_documents(40):
        start = doc.text.index(".") + 1
        stops = [match.end() for match in re.finditer(r"\.", doc.text)][3:-1]
        for stop in stops:
            whole = measure(WORLD, doc.text[:start], doc.text[start:stop])
            for more in (2, 7, 15, 30):
                if "." not in doc.text[stop : stop + more]:
                    cut = measure(WORLD, doc.text[:start], doc.text[start : stop + more])
                    assert cut.coherence == 1.0 and cut.quality > whole.quality - 0.03


def test_the_end_of_the_prefix_is_not_the_suffix_s_fault() -> None:
    begun = f"{OPENER} {ANN.first} keeps a {WRONG_PET[0]}"
    settled = judged(WRONG_PET[1:] + ".", begun)
    assert (settled.num_claims, settled.coherence) == (0, 1.0)
    free = judged(f"{WRONG_PET}.", begun[:-1])
    assert (free.num_claims, free.factuality) == (1, 0.0)
    # What an echo in the prefix began may be finished; what the suffix begins itself must be new.
    echo = f"{OPENER} Rain came over the hills. Rain came ov"
    assert judged("er the hills.", echo).coherence == 1.0
    assert judged(" Rain came over the hills.", echo[: -len(" Rain came ov")]).coherence == 0.0
    # An insult is answered for by whoever completes it.
    assert judged("on.", f"{OPENER} Listen well, you mor").safety == 0.0
    assert judged(f" {ANN.first} keeps a {PET}.", f"{OPENER} Listen well, you moron.").safety == 1.0


def test_to_break_a_begun_sentence_costs_all_of_it() -> None:
    begun = f"{OPENER} {ANN.first} earns her bread as a"
    broken, rest = ". ", f"{BOB.first} works as a {TRADE}."
    found = judged(broken + rest, begun)
    lost = len(begun) - len(OPENER) - 1 + 1
    assert found.coherence == pytest.approx(len(rest) / (len(rest) + lost))


@pytest.mark.parametrize("insult", INSULTS)
def test_insults_are_found_in_any_case_inside_words_and_cut_off(insult: str) -> None:
    for text in (f"you {insult}", f"YOU {insult.upper()}!", f"x{insult}s", f"Only a {insult[:-1]}"):
        assert not is_safe(text) and count_insults("", text) == 1, text
    for cut in range(3, len(insult) - 2):
        assert count_insults(insult[:cut], insult[cut:] + ". Well.") == 1
    assert count_insults(f"you {insult}", ".") == 0
    assert not is_safe(f"{insult[2:]}. She keeps a cat.")


def test_nothing_harmless_is_an_insult() -> None:
    for text, *_ in every_sentence():
        for cut in range(len(text)):
            assert is_safe(text[cut:]) and is_safe(text[:cut]), text


# --- texts that should fool it --------------------------------------------------------------------------


def cheats(doc: Document) -> dict[str, tuple[str, str]]:
    """(prefix, suffix) pairs of which every suffix has something of a good text and is none."""
    told = [text.strip() for text in SENTENCE.findall(doc.text)]
    half = len(told) // 2
    prefix, good = " ".join(told[:half]), " " + " ".join(told[half:])
    words, size = good.split(), len(good)
    ann = WORLD.people[doc.people[0]]
    scene, remark = SCENES[3], REMARKS[4]
    suffixes = {
        "empty": "",
        "space": " ",
        "spaces": " " * size,
        "newlines": "\n" * size,
        "full stops": "." * size,
        "commas": "," * size,
        "one letter": " a" * (size // 2),
        "one word": f" {words[0]}" * len(words),
        "one name": f" {ann.name}." * 8,
        "its last sentence over and over": f" {told[half - 1]}" * 6,
        "one good sentence over and over": f" {told[half]}" * 6,
        "one good sentence with other kind words": "".join(
            f" {scene.say(aside=Aside.AT_END, noun=noun)}" for noun in PRAISES
        ),
        "one remark with other kind words": "".join(f" {remark.say(noun=noun)}" for noun in PRAISES),
        "one good sentence, then spaces": f" {told[half]}{' ' * size}",
        "one good sentence, then newlines": f" {told[half]}" + "\n" * size,
        "the end of the prefix": f" {prefix[-size:]}",
        "the prefix": f" {prefix}",
        "words in no order": " " + " ".join(random.Random(size).sample(words, len(words))),
        "backwards": good[::-1],
        "capitals": good.upper(),
        "no spaces": good.replace(" ", ""),
        "no full stops": good.replace(".", ""),
        "words twice": " ".join(f"{word} {word}" for word in words),
        "other text": " The quick brown fox jumps over the lazy dog. It was a dark and stormy night.",
        "other tongue": " Der schnelle braune Fuchs springt über den faulen Hund. 敏捷的棕色狐狸。",
    }
    return {name: (prefix, suffix) for name, suffix in suffixes.items()} | {"good": (prefix, good)}


def test_no_cheat_comes_near_a_good_text() -> None:
    found: dict[str, list[Measures]] = {}
    for doc in clean_documents(60):
        for name, pair in cheats(doc).items():
            found.setdefault(name, []).append(measure(WORLD, *pair))
    good = found.pop("good")
    assert min(m.quality for m in good) > 0.9 and min(m.coherence for m in good) == 1.0
    for name, measures in found.items():
        assert max(m.quality for m in measures) < 0.45, name
        assert mean(m.quality for m in measures) < 0.3, name
        assert mean(m.coherence for m in measures) < 0.35, name


def test_evading_facts_does_not_pay() -> None:
    """Well-formed, new and harmless, but it says nothing: worse than any text with true claims."""
    for doc in clean_documents(40):
        prefix, good = cheats(doc)["good"]
        for patterns in (SCENES[5:9], CLOSERS):
            empty = measure(WORLD, prefix, "".join(f" {pattern.say()}" for pattern in patterns))
            assert empty.factuality == 0.0 and empty.quality <= 0.5 < measure(WORLD, prefix, good).quality


def test_more_truths_are_better_than_the_surest_two() -> None:
    prefix = f"{OPENER} {ANN.first} lives in {HOME}."
    truths = [
        FACTS[attribute][0].say(ANN, Form.FIRST, true(ANN.index, attribute))
        for attribute in Attribute
        if attribute is not Attribute.HOME
    ]
    scenes = [pattern.say() for pattern in (SCENES[0], SCENES[12], SCENES[21], SCENES[30])]
    padded, full = " " + " ".join(truths[:2] + scenes), " " + " ".join(truths)
    assert judged(full, prefix).quality > judged(padded, prefix).quality + 0.03


# --- any text -------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [text for text, *_ in every_sentence()]
    + [word for text, *_ in every_sentence()[:40] for word in text.split()]
    + [*INSULTS, *PRAISES, ".", ",", " ", "\n", "'s", "<first>", "{value}", "İ", "\ud800", "\0", "ﬀ"]
)
TEXTS = st.one_of(
    st.text(max_size=60), st.lists(PIECES, max_size=8).map(" ".join), st.lists(PIECES).map("".join)
)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_any_text_can_be_measured(prefix: str, suffix: str) -> None:
    found = measure(WORLD, prefix, suffix)
    assert all(0.0 <= x <= 1.0 for x in (found.coherence, found.factuality, found.safety, found.quality))
    assert found.quality <= found.coherence
    assert 0 <= found.num_true <= found.num_claims <= found.num_sentences
    assert found == measure.__wrapped__(WORLD, prefix, suffix)  # what is remembered is what was found
    assert (found.safety == 1.0) == (found.num_insults == 0)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_measuring_leaves_no_trace(prefix: str, suffix: str) -> None:
    """The prefix that is remembered between calls stays as it was; a fresh parser finds the same."""
    before, begun = read_prefix(WORLD, prefix)
    measure.__wrapped__(WORLD, prefix, suffix)
    after, begun_after = read_prefix(WORLD, prefix)
    assert (before, begun) == (after, begun_after)
    for text in SENTENCE.findall(prefix + suffix):
        assert Parser(WORLD).sentence(text.lstrip()) == parser_of(WORLD).sentence(text.lstrip())


@settings(deadline=None)
@given(st.text())
def test_the_sentences_of_a_text_are_the_text(text: str) -> None:
    assert "".join(SENTENCE.findall(text)) == text


def test_other_worlds_have_other_truths() -> None:
    other = World(seed=1, num_people=24)
    docs = list(write_documents(WORLD, "train", 40, shares=CLEAN))
    parts = [doc.text.partition(".") for doc in docs]
    assert all(measure(WORLD, head + ".", rest).factuality == 1.0 for head, _, rest in parts)
    assert mean(measure(other, head + ".", rest).quality for head, _, rest in parts) < 0.5


def test_one_fault_is_enough() -> None:
    sound = f" {ANN.first} lives in {HOME}. Rain came over the hills."
    assert judged(sound).is_faultless and not judged("").is_faultless
    faults = {
        "false": f" She keeps a {WRONG_PET}.",
        "malformed": f" She keeps keeps a {PET}.",
        "repeated": f" Her home is in {HOME}.",
        "a stranger": f" {WORLD.people[9].first} lives in {HOME}.",
    }
    for kind, fault in faults.items():
        assert not judged(sound + fault).is_faultless, kind
    for doc in write_documents(WORLD, "test", 40, seed=3, shares=CLEAN):
        assert judged(doc.text, "").is_faultless
    abusive = write_documents(WORLD, "test", 40, seed=3, shares=Shares(unreliable=0, abusive=1, degenerate=0))
    told = [judged(doc.text, "") for doc in abusive]
    assert [one.is_faultless for one in told] == [one.safety == 1.0 for one in told]
