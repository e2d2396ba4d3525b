"""The world's facts and documents: splits share nothing, faults come as configured, texts say what is so."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import combinations, pairwise

import pytest

from sip_engine.utils.errors import ConfigError
from sip_engine.world import Document, Shares, World, measure, write_document, write_documents
from sip_engine.world.documents import SPLITS, Decay
from sip_engine.world.facts import MEN, PETS, SURNAMES, TOWNS, TRADES, VALUES, WOMEN, YEARS, Attribute
from sip_engine.world.wordings import INSULTS, PATTERNS, PRAISES

WORLD = World(seed=0, num_people=24)
NOTHING = Shares(unreliable=0, abusive=0, degenerate=0)


def write(split: str, count: int, shares: Shares | None = None, world: World = WORLD) -> list[Document]:
    return list(write_documents(world, split, count, seed=3, shares=shares))


def sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in text.split(".") if sentence.strip()]


def named(text: str, world: World = WORLD) -> set[str]:
    """First names in a text."""
    return {person.first for person in world.people} & set(re.findall(r"\w+", text))


@pytest.fixture(scope="module")
def documents() -> dict[str, list[Document]]:
    return {split: write(split, 600) for split in SPLITS}


def test_words_of_a_list_differ_from_their_first_free_letter_on() -> None:
    for words in (TOWNS, TRADES, PETS, [year[2:] for year in YEARS]):
        assert len({word[0] for word in words}) == len(words)
    names = WOMEN + MEN
    assert len(set(names)) == len(names)
    assert not any(a != b and b.startswith(a) for a in names for b in names)
    everything = [*names, *SURNAMES, *TOWNS, *YEARS, *TRADES, *PETS, *PRAISES, *INSULTS]
    assert len(set(everything)) == len(everything)
    insults = {insult[0] for insult in INSULTS}
    assert not any(praise[0] in insults for praise in PRAISES)


def test_truths_and_myths_are_two_values_of_the_attribute() -> None:
    for person in WORLD.people:
        for attribute in Attribute:
            truth, myth = WORLD.truth(person.index, attribute), WORLD.myth(person.index, attribute)
            assert truth != myth and {truth, myth} <= set(VALUES[attribute])
    assert len({person.first for person in WORLD.people}) == 24
    other = World(seed=1, num_people=24)
    changed = [
        WORLD.truth(i, attribute) != other.truth(i, attribute) for i in range(24) for attribute in Attribute
    ]
    assert sum(changed) > 80  # of 120; at random about 108


def test_groups_are_a_partition() -> None:
    for num_people in (12, 13, 17, 24, 31, 48):
        groups = World(num_people=num_people).groups
        assert sorted(person for group in groups for person in group) == list(range(num_people))
        assert all(len(group) >= 6 for group in groups)


@pytest.mark.parametrize("most", [2, 3, 4, 6])
def test_more_people_make_longer_documents(most: int) -> None:
    world = World(num_people=48, people_per_document=most)
    documents = [doc for split in SPLITS for doc in write(split, 60, NOTHING, world)]
    assert {len(doc.people) for doc in documents} == {max(2, most - 1), most}
    words = sum(len(doc.text.split()) for doc in documents) / len(documents)
    assert 17 * most < words < 34 * most
    for doc in documents:
        assert named(doc.text, world) == {world.people[person].first for person in doc.people}
        cut = doc.text.index(".") + 1
        told = measure(world, doc.text[:cut], doc.text[cut:])
        assert told.coherence == told.factuality == 1.0 and told.num_true >= most


def test_degenerate_narrators_of_long_documents_run_out_of_remarks() -> None:
    world = World(num_people=48, people_per_document=6)
    for doc in write("train", 200, Shares(abusive=1, insult=1), world):
        assert len(sentences(doc.text)) > 20


@pytest.mark.parametrize(("num_people", "most", "limit"), [(48, 1, 6), (48, 7, 6), (24, 5, 4), (12, 4, 3)])
def test_as_many_people_as_there_are_groups_can_meet(num_people: int, most: int, limit: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"people_per_document = {most}: must lie in 2\.\.{limit}, .*{num_people}"
    ):
        World(num_people=num_people, people_per_document=most)
    assert World(num_people=num_people, people_per_document=limit)


@pytest.mark.parametrize("num_people", [-1, 0, 11, 49])
def test_impossible_worlds_are_refused(num_people: int) -> None:
    with pytest.raises(ConfigError, match=r"num_people = .*12\.\.48"):
        World(num_people=num_people)


def test_impossible_shares_and_splits_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"abusive = 1\.5"):
        Shares(abusive=1.5)
    with pytest.raises(ConfigError, match=r"'dev'.*train, judge, test"):
        write_document(WORLD, "dev", 0)


def pairs_of(documents: Iterable[Document]) -> set[frozenset[str]]:
    """Everyone who is named together with someone else, read off the texts."""
    return {frozenset(pair) for doc in documents for pair in combinations(named(doc.text), 2)}


def test_splits_share_no_document(documents: dict[str, list[Document]]) -> None:
    texts = {split: {doc.text for doc in docs} for split, docs in documents.items()}
    casts = {split: {frozenset(named(doc.text)) for doc in docs} for split, docs in documents.items()}
    for one, other in combinations(SPLITS, 2):
        assert not texts[one] & texts[other]
        assert not casts[one] & casts[other]


def test_people_of_the_test_split_never_meet_elsewhere(documents: dict[str, list[Document]]) -> None:
    test, train = pairs_of(documents["test"]), pairs_of(documents["train"])
    assert len(test) > 50 and len(train) > 150
    assert not test & (train | pairs_of(documents["judge"]))


def test_everyone_is_met_in_every_split(documents: dict[str, list[Document]]) -> None:
    for docs in documents.values():
        assert len({name for doc in docs for name in named(doc.text)}) == 24


@pytest.mark.parametrize("num_people", [12, 18])
def test_small_worlds_have_documents_in_every_split(num_people: int) -> None:
    world = World(num_people=num_people)
    for split in SPLITS:
        assert all(len(named(doc.text, world)) in (2, 3) for doc in write(split, 30, world=world))


def test_documents_depend_on_seed_split_and_number_only() -> None:
    assert write_document(WORLD, "train", 7, seed=3) == write("train", 8)[7]
    assert write_document(World(seed=0, num_people=24), "train", 7, seed=3) == write("train", 8)[7]
    others = [write_document(WORLD, "train", 7, seed=4), write_document(WORLD, "train", 6, seed=3)]
    assert all(other.text != write("train", 8)[7].text for other in others)


def test_nothing_depends_on_the_hash_seed_of_the_process() -> None:
    code = """if True:
        from hashlib import sha256
        from sip_engine.types import RewriteRequest
        from sip_engine.world import World, WorldRewriter, corrupt, measure, write_documents
        world = World(seed=0, num_people=24)
        docs = [doc.text for doc in write_documents(world, "train", 40, seed=3)]
        cuts = [(text[:90], text[90:240]) for text in docs]
        rewrites = WorldRewriter(world).rewrite([RewriteRequest(*cut) for cut in cuts])
        results = [[measure(world, *cut), corrupt(world, *cut)] for cut in cuts]
        print(sha256(repr((docs, rewrites, results)).encode()).hexdigest())
    """
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1 and len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


def share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


def has_insult(text: str) -> bool:
    return any(insult in text for insult in INSULTS)


def is_doubled(sentence: str) -> bool:
    words = sentence.split()
    return words[::2] == words[1::2]


def test_shares_of_faulty_documents(documents: dict[str, list[Document]]) -> None:
    docs = [doc for split in SPLITS for doc in documents[split]]  # 1800: a standard error of 0.012 or less
    assert share("gossip" in doc.text for doc in docs) == pytest.approx(0.40, abs=0.04)
    assert share(has_insult(doc.text) for doc in docs) == pytest.approx(0.25, abs=0.04)
    assert share(doc.decay is not None for doc in docs) == pytest.approx(0.20, abs=0.04)
    assert share(doc.style == "clean" for doc in docs) == pytest.approx(0.6 * 0.75 * 0.8, abs=0.04)


@pytest.mark.parametrize("wanted", [0.0, 0.7, 1.0])
def test_configured_shares_are_kept(wanted: float) -> None:
    docs = write("train", 400, Shares(unreliable=wanted, abusive=wanted, degenerate=wanted))
    for flags in (
        ["gossip" in doc.text for doc in docs],
        [has_insult(doc.text) for doc in docs],
        [doc.decay is not None for doc in docs],
    ):
        assert share(flags) == pytest.approx(wanted, abs=0.09 * (0 < wanted < 1))


def test_flags_of_a_document_are_those_of_its_text(documents: dict[str, list[Document]]) -> None:
    decays: Counter[Decay | None] = Counter()
    for doc in documents["train"]:
        told = sentences(doc.text)
        assert doc.unreliable == ("gossip" in doc.text)
        assert (doc.abuse is not None) == has_insult(doc.text)
        assert {WORLD.people[i].first for i in doc.people} == named(doc.text)
        echoes = any(a == b for a, b in pairwise(told))
        assert echoes == (doc.decay is Decay.ECHO)
        assert any(map(is_doubled, told)) == (doc.decay is Decay.STUTTER)
        decays[doc.decay] += 1
    assert set(decays) == {None, *Decay}


def facts_told(doc: Document) -> list[tuple[str, Attribute, str]]:
    """(first name, attribute, "truth" | "myth" | "neither") of each statement in a document, by regex."""
    told = []
    people = {person.first: person for person in WORLD.people}
    genders = {"She": "she", "she": "she", "Her": "she", "her": "she"} | dict.fromkeys(
        ("He", "he", "His", "his", "him"), "he"
    )
    recent = None
    for sentence in sentences(doc.text):
        words = re.findall(r"\w+", sentence)
        for word in words:
            recent = people.get(word, recent)
        assert recent is not None
        pronouns = {genders[word] for word in words if word in genders}
        assert pronouns <= {recent.gender.value}, sentence
        for pattern in PATTERNS:
            if pattern.attribute is None:
                continue
            person = "|".join(map(re.escape, (recent.name, recent.first, *genders)))
            regex = re.escape(pattern.text).replace(r"\{value\}", r"(?P<value>\w+)")
            regex = re.sub(
                r"\\\{(They|they|Their|their|them)\\\}", f"(?:{person})(?:'s)?(?:, that \\\\w+,)?", regex
            )
            regex = regex.replace(r"\{own\}", "(?:his|her)")
            if found := re.fullmatch(regex + r"(?:, you \w+)?", sentence):
                kinds = {
                    WORLD.truth(recent.index, pattern.attribute): "truth",
                    WORLD.myth(recent.index, pattern.attribute): "myth",
                }
                told.append((recent.first, pattern.attribute, kinds.get(found["value"], "neither")))
    return told


def test_reliable_narrators_tell_the_truth_and_others_myths() -> None:
    shares = Shares(degenerate=0)
    told = {True: Counter(), False: Counter()}
    for doc in write("train", 400, shares):
        told[doc.unreliable].update(kind for _, _, kind in facts_told(doc))
    assert set(told[False]) == {"truth"}
    assert set(told[True]) == {"truth", "myth"}
    assert told[True]["myth"] / told[True].total() == pytest.approx(0.9, abs=0.03)
    assert told[True].total() + told[False].total() > 2800  # about 8 a document


def test_documents_have_a_natural_length_and_tell_nothing_twice() -> None:
    for doc in write("judge", 300, NOTHING):
        told = sentences(doc.text)
        assert 7 <= len(told) <= 18 and 200 < len(doc.text) < 900
        facts = [(name, attribute) for name, attribute, _ in facts_told(doc)]
        assert len(set(facts)) == len(facts)
        assert len(facts) >= 0.5 * len(told) - 1
        assert len(facts) <= 5 * len(doc.people) - 2


def test_documents_are_various() -> None:
    docs = write("train", 2000)
    assert len({doc.text for doc in docs}) == 2000
    starts = Counter(doc.text.split()[0] for doc in docs)
    assert max(starts.values()) < 0.5 * 2000
