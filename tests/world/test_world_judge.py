"""The world's judge, rewriter and spoiler: they follow the truth, and take any text."""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache
from itertools import combinations, islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sip_engine.config.judge import JudgeConfig
from sip_engine.judges.rewards import judge_pools
from sip_engine.types import (
    Candidate,
    Cost,
    FactualityQuestion,
    Judge,
    Kind,
    PairQuestion,
    Rewriter,
    RewriteRequest,
    SafetyQuestion,
    Sample,
    Score,
)
from sip_engine.world import (
    Measures,
    Shares,
    World,
    WorldJudge,
    WorldRewriter,
    corrupt,
    measure,
    write_documents,
)
from sip_engine.world.endings import find_endings
from sip_engine.world.facts import Attribute, Gender
from sip_engine.world.parse import SENTENCE, parser_of, read_prefix
from sip_engine.world.wordings import INSULTS

WORLD = World(seed=0, num_people=24)
CLEAN = Shares(unreliable=0, abusive=0, degenerate=0)
NAMES = {person.first for person in WORLD.people}
JUDGE: Judge = WorldJudge(WORLD)
REWRITER: Rewriter = WorldRewriter(WORLD)


@cache
def cuts(
    count: int = 150, shares: Shares | None = None, split: str = "train", size: int = 150
) -> list[tuple[str, str]]:
    """(prefix, suffix) pairs of documents, cut anywhere behind the first 70 characters."""
    rng = random.Random(count)
    pairs = []
    for doc in write_documents(WORLD, split, count, seed=8, shares=shares):
        cut = rng.randrange(70, len(doc.text) - 30)
        pairs.append((doc.text[:cut], doc.text[cut : cut + size]))
    return pairs


def at_full_stops(count: int = 100, shares: Shares | None = CLEAN) -> list[tuple[str, str]]:
    """(prefix, suffix) pairs of documents, cut between sentences: four sentences each."""
    pairs = []
    for doc in write_documents(WORLD, "train", count, seed=9, shares=shares):
        told = SENTENCE.findall(doc.text)
        pairs.append(("".join(told[:3]), "".join(told[3:7])))
    return pairs


def judged(prefix: str, suffix: str) -> Measures:
    return measure(WORLD, prefix, suffix)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def answers(*questions: PairQuestion | SafetyQuestion | FactualityQuestion) -> list[float]:
    scores = JUDGE.judge(questions, seed=5)
    assert all(isinstance(score, Score) for score in scores)
    return [score.value for score in scores if isinstance(score, Score)]


def rewrite(prefix: str, suffix: str, seed: int = 0) -> str:
    (text,) = REWRITER.rewrite([RewriteRequest(prefix, suffix)], seed=seed)
    assert isinstance(text, str)
    return text


# --- judge ----------------------------------------------------------------------------------------------


def with_lies(suffix: str) -> str:
    """Every value replaced by another one of its kind, whoever it is about."""
    shift = {}
    for person, attribute in (
        (person.index, attribute) for person in WORLD.people for attribute in Attribute
    ):
        shift[WORLD.truth(person, attribute)] = WORLD.myth(person, attribute)
    return re.sub(r"\w+", lambda match: shift.get(match[0], match[0]), suffix)


def test_the_judge_follows_the_truth() -> None:
    decided = 0
    for prefix, good in at_full_stops():
        lie = with_lies(good)
        if lie == good:
            continue
        wins, reverse, true, false = answers(
            PairQuestion(prefix, good, lie),
            PairQuestion(prefix, lie, good),
            FactualityQuestion(prefix, good, good),
            FactualityQuestion(prefix, good, lie),
        )
        assert (wins, reverse) == (1.0, 0.0)
        assert true == 1.0 and false < 0.5
        decided += 1
    assert decided > 80


def test_safety_is_about_the_suffix_alone() -> None:
    pieces = {insult[:size] for insult in INSULTS for size in range(3, len(insult))}
    pieces |= {insult[-size:] for insult in INSULTS for size in range(3, len(insult))}
    unsafe = 0
    for _, suffix in cuts():
        (safe,) = answers(SafetyQuestion(suffix))
        words = words_of(suffix)
        if any(insult in suffix for insult in INSULTS):
            assert safe == 0.0
            unsafe += 1
        elif words[0] not in pieces and words[-1] not in pieces:
            assert safe == 1.0
    assert 20 < unsafe < 75


def test_coherent_text_wins() -> None:
    for prefix, good in at_full_stops():
        words = good.split()
        shuffled = " " + " ".join(random.Random(len(good)).sample(words, len(words)))
        stuttered = " " + " ".join(f"{word} {word}" for word in words)
        for bad in (shuffled, stuttered, "", good.replace(" ", ""), " " + prefix[-len(good) :]):
            assert answers(PairQuestion(prefix, good, bad), PairQuestion(prefix, bad, good)) == [1.0, 0.0]


def test_all_answers_are_scores_of_one_vote_and_one_call_in_order() -> None:
    prefix, suffix = cuts()[0]
    questions = [SafetyQuestion(suffix), PairQuestion(prefix, suffix, suffix), SafetyQuestion("you moron")]
    assert JUDGE.judge(questions) == [
        Score(value, (value,), Cost(calls=1)) for value in (float("you" not in suffix), 0.5, 0.0)
    ]
    assert JUDGE.judge([]) == []


def test_pools_are_judged_as_the_measures_say() -> None:
    """Through the loop's own judging: rank by wins is rank by quality, all verdicts are there."""
    pools = []
    for number, (prefix, suffix) in enumerate(cuts()[:20]):
        others = [text for _, text in cuts()[number : number + 6]]
        texts = [suffix, rewrite(prefix, suffix), *others]
        none = np.zeros(0, np.int32)
        sample = Sample(number, 0, none, none, prefix, suffix)
        pools.append((sample, [Candidate(Kind.ROLLOUT, i, none, text) for i, text in enumerate(texts)]))
    for (sample, pool), verdict in zip(pools, judge_pools(JUDGE, JudgeConfig(), pools, seed=1), strict=True):
        assert not verdict.failures and None not in verdict.rewards
        qualities = [judged(sample.prefix, candidate.text).quality for candidate in pool]
        for i, j in combinations(range(len(pool)), 2):
            first, second = verdict.quality[i], verdict.quality[j]
            assert first is not None and second is not None
            assert (first > second) == (qualities[i] > qualities[j])


# --- rewriter -------------------------------------------------------------------------------------------


def test_good_suffixes_come_back_unchanged() -> None:
    good = [(p, s) for p, s in cuts(150, CLEAN) if judged(p, s).num_claims]
    assert len(good) > 100
    assert all(rewrite(prefix, suffix) == suffix for prefix, suffix in good)


@pytest.mark.parametrize(
    "shares", [Shares(degenerate=0), Shares(1, 0, 0), Shares(0, 1, 0), Shares(0, 0, 1), Shares(1, 1, 1)]
)
def test_rewrites_are_true_safe_and_coherent(shares: Shares) -> None:
    improved = 0
    for prefix, suffix in cuts(120, shares):
        text = rewrite(prefix, suffix)
        before, after = judged(prefix, suffix), judged(prefix, text)
        assert after.factuality == after.safety == 1.0, (prefix, suffix, text)
        assert after.num_claims >= 1
        begun = read_prefix(WORLD, prefix)[1].lstrip()
        people = sorted(read_prefix(WORLD, prefix)[0].topic)
        recent = read_prefix(WORLD, prefix)[0].recent
        can_be_finished = not begun or any(
            judged(prefix, ending).coherence == 1.0
            for ending in find_endings(parser_of(WORLD), begun, people, recent, random.Random(0))
        )
        if can_be_finished:
            assert after.coherence == 1.0, (prefix, suffix, text)
        # A sentence that the prefix broke, or an insult that it began, may cost coherence once.
        assert after.quality >= before.quality or before.safety < 1.0
        improved += after.quality > before.quality
    assert improved > 40


def test_rewrites_are_as_long_as_the_original() -> None:
    for prefix, suffix in cuts(150, Shares(1, 1, 1)):
        text = rewrite(prefix, suffix)
        assert len(suffix.split()) - 1 <= len(text.split()) <= 2 * len(suffix.split()) + 12


def test_a_rewrite_mends_one_sentence_and_leaves_the_others() -> None:
    """Spoilt by hand, one good sentence becomes itself again and the text around it does not change."""
    mended = 0
    for prefix, good in at_full_stops():
        told = SENTENCE.findall(good)
        if "," in good or judged(prefix, good).num_claims < 2 or judged(prefix, told[0]).num_claims == 0:
            continue
        spoilt = (
            told[1][:-1] + ", you dunce.",
            with_lies(told[1]),
            " " + " ".join(f"{word} {word}" for word in told[1][:-1].split()) + ".",
            told[1].replace(" ", "  "),
        )
        for sentence in spoilt:
            text = rewrite(prefix, told[0] + sentence + "".join(told[2:]))
            kept = SENTENCE.findall(text)
            assert kept[:2] == told[:2], (prefix, good, sentence)
            assert set(told) <= set(kept)
            mended += sentence != told[1]
    assert mended > 100


def test_a_rewrite_leaves_out_what_cannot_be_mended() -> None:
    for prefix, good in at_full_stops():
        told = SENTENCE.findall(good)
        words = told[1][:-1].split()
        for sentence in (
            " " + " ".join(words[::-1]) + ".",
            " Lorem ipsum dolor.",
            told[0],
            "..",
            " you moron.",
        ):
            kept = SENTENCE.findall(rewrite(prefix, told[0] + sentence + told[2] + told[3]))
            assert sentence not in kept[1:] and kept[0] == told[0]


WOMEN = [person for person in WORLD.people if person.gender is Gender.SHE]
ANN, EVE = WOMEN[:2]
OPENER = f"The town record tells of {ANN.name} and {EVE.name}."


def test_names_take_the_place_of_pronouns_that_lost_theirs() -> None:
    eves, anns = (WORLD.truth(person.index, Attribute.PET) for person in (EVE, ANN))
    prefix = f"{OPENER} {ANN.first} is a jewel."
    broken = f" {EVE.first} {EVE.first} works. "
    text = rewrite(
        prefix, f"{broken}She keeps a {eves}. Her home is in {WORLD.truth(EVE.index, Attribute.HOME)}."
    )
    first, second = SENTENCE.findall(text)[:2]
    assert EVE.first in first and eves in first  # "She" would now be Ann
    assert second.startswith(" Her home is in ")
    # What is said of somebody else by then, and cannot name her, is left out.
    remark = "What a legend she is."
    assert remark in rewrite(prefix, f" {EVE.first} keeps a {eves}. {remark}")
    assert remark not in rewrite(prefix, f"{broken}{remark} {ANN.first} keeps a {anns}.")


def test_begun_sentences_are_finished_in_the_best_way() -> None:
    begun = f"The town record tells of {ANN.name} and {WORLD.people[1].first[0]}"
    assert judged(begun, rewrite(begun, "xyzzy. Lorem ipsum.")).coherence == 1.0
    wrong = f"{OPENER} {ANN.first} keeps a {WORLD.myth(ANN.index, Attribute.PET)[0]}"
    assert judged(wrong, rewrite(wrong, "xyzzy.")).coherence == 1.0
    hopeless = f"{OPENER} Lorem ipsum"
    assert rewrite(hopeless, f" dolor sit amet. {ANN.first} is a jewel.").startswith(
        f". {ANN.first} is a jewel."
    )


def test_endings_are_sound_and_true_where_there_is_a_choice() -> None:
    parser, looked_at = parser_of(WORLD), 0
    for prefix, _ in cuts(100, CLEAN):
        reader, begun = read_prefix(WORLD, prefix)
        head, people = begun.lstrip(), sorted(reader.topic)
        for ending in islice(find_endings(parser, head, people, reader.recent, random.Random(0)), 200):
            found = judged(prefix, ending)
            assert found.coherence == found.safety == 1.0 or not head, (prefix, ending)
            assert found.num_true == found.num_claims, (prefix, ending)
            looked_at += 1
    assert looked_at > 1000


def test_rewrites_depend_on_the_request_and_the_seed_only() -> None:
    requests = [RewriteRequest(prefix, suffix) for prefix, suffix in cuts(40, Shares(1, 1, 1))]
    all_at_once = REWRITER.rewrite(requests, seed=3)
    one_by_one = [rewrite(request.prefix, request.suffix, seed=3) for request in reversed(requests)]
    assert all_at_once == one_by_one[::-1]
    assert WorldRewriter(World(seed=0, num_people=24)).rewrite(requests, seed=3) == all_at_once
    assert REWRITER.rewrite(requests, seed=4) != all_at_once


# --- corrupt --------------------------------------------------------------------------------------------


def test_spoilt_suffixes_are_always_worse() -> None:
    for prefix, suffix in [*cuts(150), *cuts(150, CLEAN, "judge", 60), *cuts(100, CLEAN, "judge", 12)]:
        for seed in range(3):
            spoilt, _ = corrupt(WORLD, prefix, suffix, seed)
            if judged(prefix, suffix).quality == 0.0:
                assert spoilt == suffix
            else:
                assert judged(prefix, spoilt).quality < judged(prefix, suffix).quality
                assert answers(PairQuestion(prefix, suffix, spoilt)) == [1.0]


def test_suffixes_are_spoilt_in_every_way() -> None:
    """Faults are told apart by what they do to the text, and each of the six is drawn."""
    drawn: Counter[str] = Counter()
    for prefix, suffix in at_full_stops(150):
        spoilt, _ = corrupt(WORLD, prefix, suffix, seed=1)
        before, after = words_of(suffix), words_of(spoilt)
        told = SENTENCE.findall(spoilt)
        drawn["insult"] += bool(set(INSULTS) & set(after))
        drawn["stutter"] += any(a == b for a, b in pairwise(after))
        drawn["salad"] += sorted(before) == sorted(after) and before != after
        drawn["lie"] += len(before) == len(after) and judged(prefix, spoilt).factuality < 1.0
        drawn["echo"] += len({*told, *SENTENCE.findall(prefix)}) < len(told) + 3
        drawn["digression"] += not NAMES & set(after) <= NAMES & set(words_of(prefix))
    assert min(drawn.values()) > 10, drawn


# --- any text -------------------------------------------------------------------------------------------

WORDS = sorted({word for prefix, suffix in cuts() for word in re.findall(r"\w+|\W", prefix + suffix)})
TEXTS = st.one_of(
    st.text(max_size=60),
    st.sampled_from(cuts()).map(lambda pair: pair[1]),
    st.lists(st.sampled_from([*WORDS, *INSULTS, ".", " ", "\n", "İ", "\ud800"]), max_size=12).map(" ".join),
)


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_any_text_gets_antisymmetric_answers(prefix: str, first: str, second: str) -> None:
    forth, back, factual, safe = answers(
        PairQuestion(prefix, first, second),
        PairQuestion(prefix, second, first),
        FactualityQuestion(prefix, second, first),
        SafetyQuestion(first),
    )
    assert forth + back == 1.0 and forth in (0.0, 0.5, 1.0)
    assert 0.0 <= factual <= 1.0 and safe in (0.0, 1.0)
    assert WorldJudge(World(seed=0, num_people=24)).judge([PairQuestion(prefix, first, second)], seed=9) == [
        Score(forth, (forth,), Cost(calls=1))
    ]


@settings(deadline=None)
@given(TEXTS, TEXTS, st.integers(0, 3))
def test_any_text_can_be_rewritten_and_spoilt(prefix: str, suffix: str, seed: int) -> None:
    before, after = judged(prefix, suffix), judged(prefix, rewrite(prefix, suffix, seed))
    assert (after.safety, after.factuality) == (1.0, 1.0)
    assert after.quality >= before.quality or before.safety < 1.0
    spoilt = judged(prefix, corrupt(WORLD, prefix, suffix, seed)[0])
    assert spoilt.quality < before.quality or before.quality == 0.0
