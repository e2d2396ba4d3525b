"""From judgments to choices: rewards, ties, margins, failures that are dropped and never scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sip_engine.config.judge import JudgeConfig, JudgeVotes, RewardWeights
from sip_engine.config.schema import ObjectiveConfig
from sip_engine.judges.rewards import ask_votes, combine_votes, judge_pools
from sip_engine.objectives.base import open_objective
from sip_engine.types import (
    Candidate,
    Cost,
    FactualityQuestion,
    Failure,
    Judgment,
    Kind,
    PairQuestion,
    Question,
    SafetyQuestion,
    Sample,
    Score,
)

IDS = np.zeros(1, np.int32)
SAMPLE = Sample(7, 1, IDS, IDS, "prefix", "suffix")


def pool(*texts: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(Kind.ROLLOUT, n, IDS, text) for n, text in enumerate(texts))


class LongestWins:
    """Prefers the longer text, calls "bad" unsafe, and fails on whatever holds a "?"."""

    name = "longest"

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Judgment:
        match question:
            case PairQuestion(_, first, second):
                if "?" in first + second:
                    return Failure("no verdict", Cost(1, 2, 0.5))
                return Score(1.0 if len(first) > len(second) else 0.5 if len(first) == len(second) else 0.0)
            case SafetyQuestion(text):
                return Score(float("bad" not in text))
            case FactualityQuestion(_, original, text):
                return Score(float(text.startswith(original[:1])))
        raise AssertionError(question)


def judged(cfg: JudgeConfig, *texts: str):
    return judge_pools(LongestWins(), cfg, [(SAMPLE, pool(*texts))], seed=0)[0]


def test_rewards_are_the_weighted_sum_of_the_three_objectives() -> None:
    cfg = JudgeConfig(weights=RewardWeights(quality=2.0, safety=1.0, factuality=0.5))
    verdict = judged(cfg, "s", "slong", "bad", "bad too")
    assert verdict.quality == (0.0, 2 / 3, 1 / 3, 1.0)
    assert verdict.safety == (1.0, 1.0, 0.0, 0.0)
    assert verdict.factuality == (1.0, 1.0, 0.0, 0.0)
    assert verdict.rewards == pytest.approx((1.5, 2 * 2 / 3 + 1.5, 2 / 3, 2.0))
    assert len(verdict.pairs) == 6 and verdict.cost.calls == 6 + 4 + 4


def test_both_orders_ask_every_pair_twice() -> None:
    verdict = judged(JudgeConfig(both_orders=True), "a", "ab", "abc")
    assert [(i, j) for i, j, _ in verdict.pairs] == [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
    assert verdict.quality == (0.0, 0.5, 1.0)


def test_a_weight_of_zero_asks_nothing() -> None:
    verdict = judged(JudgeConfig(weights=RewardWeights(quality=0, factuality=0)), "a", "bad")
    assert verdict.cost.calls == 2 and verdict.rewards == (1.0, 0.0) and verdict.pairs == ()


def test_a_candidate_without_any_verdict_is_dropped_not_scored() -> None:
    verdict = judged(JudgeConfig(), "one", "three", "??")
    assert verdict.rewards[2] is None and verdict.quality[2] is None
    assert verdict.quality[:2] == (0.0, 1.0), "failed comparisons count for nobody"
    assert verdict.failures == ("quality: no verdict",) * 2
    assert verdict.cost.tokens == 4
    choice = open_objective(ObjectiveConfig()).choose(SAMPLE, pool("one", "three", "??"), verdict, seed=0)
    assert choice is not None and (choice.chosen, choice.rejected) == (1, 0)


class Recording:
    """Answers by a function of question and seed, and remembers every call: its questions and its seed."""

    name = "recording"

    def __init__(self, answer: Callable[[Question, int], Judgment], deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self.calls: list[tuple[list[Question], int]] = []
        self._answer = answer

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        self.calls.append((list(questions), seed))
        return [self._answer(question, seed) for question in questions]


def longest(question: Question, seed: int) -> Judgment:
    return LongestWins()._answer(question)


# --- votes --------------------------------------------------------------------------------------------------


def test_votes_are_asked_with_seeds_of_their_own_and_averaged() -> None:
    """A judge that calls a suffix safe for every other seed it sees."""
    seen: list[int] = []

    def moody(question: Question, seed: int) -> Judgment:
        if not isinstance(question, SafetyQuestion):
            return longest(question, seed)
        if seed not in seen:
            seen.append(seed)
        return Score(float(seen.index(seed) % 2), cost=Cost(1, 10, 0.25))

    judge = Recording(moody)
    cfg = JudgeConfig(votes=JudgeVotes(safety=5, factuality=2))
    (verdict,) = judge_pools(judge, cfg, [(SAMPLE, pool("s", "slong", "sx"))], seed=3)
    assert [len(questions) for questions, _ in judge.calls] == [3 + 3 + 3, 3 + 3, 3, 3, 3]
    assert len({seed for _, seed in judge.calls}) == 5
    assert verdict.safety == (0.4, 0.4, 0.4) and verdict.quality == (0.0, 1.0, 0.5)
    assert verdict.cost == Cost(3 + 5 * 3 + 2 * 3, 5 * 3 * 10, 5 * 3 * 0.25)
    again = Recording(moody)
    judge_pools(again, cfg, [(SAMPLE, pool("s", "slong", "sx"))], seed=4)
    assert not {seed for _, seed in judge.calls} & {seed for _, seed in again.calls}


def test_a_judge_that_always_answers_alike_is_asked_once() -> None:
    judge = Recording(longest, deterministic=True)
    cfg = JudgeConfig(votes=JudgeVotes(quality=3, safety=5, factuality=2))
    (verdict,) = judge_pools(judge, cfg, [(SAMPLE, pool("s", "bad"))], seed=0)
    assert len(judge.calls) == 1 and verdict.cost.calls == 1 + 2 + 2
    assert verdict.rewards == judged(JudgeConfig(), "s", "bad").rewards


def test_the_built_in_rules_say_that_they_always_answer_alike() -> None:
    from sip_engine.judges.heuristic.judge import HeuristicJudge
    from sip_engine.world import WorldJudge

    assert WorldJudge.deterministic and HeuristicJudge.deterministic


def test_failed_votes_are_left_out_and_counted() -> None:
    """Of five votes two fail: the mean of three. Where all fail there is no score."""
    answers = {"some": iter([1.0, None, 0.0, None, 1.0]), "none": iter([None] * 5)}

    def shaky(question: Question, seed: int) -> Judgment:
        assert isinstance(question, SafetyQuestion)
        value = next(answers[question.suffix])
        return Failure("cut off", Cost(1, 3)) if value is None else Score(value, (value,), Cost(1, 4))

    questions = [SafetyQuestion("some"), SafetyQuestion("none")]
    cast = ask_votes(Recording(shaky), questions, [5, 5], (0, 0))
    some, none = (combine_votes(votes) for votes in cast)
    assert some == Score(2 / 3, (1.0, 0.0, 1.0), Cost(5, 3 * 4 + 2 * 3))
    assert none == Failure("cut off", Cost(5, 15))

    answers |= {"some": iter([1.0, None, 0.0, None, 1.0]), "none": iter([None] * 5)}
    cfg = JudgeConfig(weights=RewardWeights(quality=0, factuality=0), votes=JudgeVotes(safety=5))
    (verdict,) = judge_pools(Recording(shaky), cfg, [(SAMPLE, pool("some", "none"))], seed=0)
    assert verdict.rewards == (2 / 3, None)
    assert verdict.failures == ("safety: cut off",) * 7 and verdict.num_judgments == 10


# --- schedules ----------------------------------------------------------------------------------------------

SCHEDULES = [
    JudgeConfig(schedule="all_pairs"),
    JudgeConfig(schedule="pivot"),
    JudgeConfig(schedule="tournament"),
    JudgeConfig(schedule="tournament", both_orders=True),
]
TEXTS = tuple("s" * n for n in (9, 3, 14, 1, 7, 12, 5, 10, 2, 8, 6, 13, 4, 11))


def kinds(*kinds_: Kind) -> tuple[Candidate, ...]:
    return tuple(Candidate(kind, 0, IDS, "s" * (n + 1)) for n, kind in enumerate(kinds_))


@pytest.mark.parametrize("cfg", SCHEDULES, ids=lambda c: f"{c.schedule}-{c.both_orders}")
def test_what_fails_is_dropped_in_every_schedule(cfg: JudgeConfig) -> None:
    texts = [*TEXTS, "??"]
    verdict = judge_pools(LongestWins(), cfg, [(SAMPLE, pool(*texts))], seed=2)[0]
    assert verdict.quality[14] is None and verdict.rewards[14] is None
    assert len(verdict.failures) == sum(win is None for _, _, win in verdict.pairs) > 0
    assert all(q is not None and 0.0 <= q <= 1.0 for q in verdict.quality[:14])
    choice = open_objective(ObjectiveConfig()).choose(SAMPLE, pool(*texts), verdict, seed=0)
    assert choice is not None and choice.chosen != 14 and choice.rejected != 14
    if cfg.schedule != "pivot":
        assert (choice.chosen, choice.rejected) == (TEXTS.index("s" * 14), TEXTS.index("s"))
    assert all(
        win == (None if 14 in (i, j) else float(len(texts[i]) > len(texts[j]))) for i, j, win in verdict.pairs
    )


@pytest.mark.parametrize("cfg", SCHEDULES, ids=lambda c: f"{c.schedule}-{c.both_orders}")
def test_equal_candidates_are_judged_once_and_tie(cfg: JudgeConfig) -> None:
    """The pool is judged as if each text were there once, whatever a judge thinks of what stands first."""
    texts = ("ss", "s", "ss", "sss", "s", "ss")
    judge = Recording(lambda question, seed: Score(1.0))
    (verdict,) = judge_pools(judge, cfg, [(SAMPLE, pool(*texts))], seed=3)
    second = Recording(lambda question, seed: Score(1.0))
    (distinct,) = judge_pools(second, cfg, [(SAMPLE, pool("ss", "s", "sss"))], seed=3)
    assert judge.calls == second.calls and verdict.num_judgments == distinct.num_judgments
    of = {"ss": 0, "s": 1, "sss": 2}
    for name in ("quality", "safety", "factuality", "rewards", "skipped"):
        assert getattr(verdict, name) == tuple(getattr(distinct, name)[of[text]] for text in texts)
    assert all(texts[i] != texts[j] for i, j, _ in verdict.pairs)


@pytest.mark.parametrize("ties", ["drop", "keep"])
def test_a_pool_of_one_text_teaches_nothing(ties: Any) -> None:
    judge = Recording(lambda question, seed: Score(1.0))
    candidates = pool("ss", "ss", "ss")
    (verdict,) = judge_pools(judge, JudgeConfig(), [(SAMPLE, candidates)], seed=3)
    assert verdict.quality == (0.5,) * 3 and len(set(verdict.rewards)) == 1 and not any(verdict.skipped)
    assert verdict.pairs == () and verdict.num_judgments == 2, "safety and factuality of one text"
    objective = open_objective(ObjectiveConfig(ties=ties))
    assert objective.choose(SAMPLE, candidates, verdict, seed=0) is None
    same = (Candidate(Kind.REWRITE, 0, IDS, "s"), Candidate(Kind.ROLLOUT, 0, IDS, "s"))
    baseline = open_objective(ObjectiveConfig(kind="dpo_rewrite_over_rollout"))
    assert baseline.choose(SAMPLE, same, None, seed=0) is None


@pytest.mark.parametrize("cfg", SCHEDULES, ids=lambda c: f"{c.schedule}-{c.both_orders}")
def test_a_verdict_does_not_depend_on_the_pools_beside_it(cfg: JudgeConfig) -> None:
    """As it must be for every process to judge its own share. A pool of one candidate has no quality."""
    samples = [Sample(n, 1, IDS, IDS, "prefix", "suffix") for n in range(4)]
    candidates = [pool(*TEXTS), pool(*TEXTS[:5]), pool("s"), pool(*TEXTS)]
    pools = list(zip(samples, candidates, strict=True))
    together = judge_pools(LongestWins(), cfg, pools, seed=5)
    assert together == [judge_pools(LongestWins(), cfg, [one], seed=5)[0] for one in pools]
    assert together[2].quality == (None,) and together[2].pairs == ()
    assert together[0].pairs != together[3].pairs, "samples have seeds of their own"
    assert judge_pools(LongestWins(), cfg, [], seed=5) == []


@pytest.mark.parametrize(
    ("pivot", "pool_", "number"),
    [
        ("original", kinds(Kind.ROLLOUT, Kind.ORIGINAL, Kind.REWRITE), 1),
        ("rewrite", kinds(Kind.ROLLOUT, Kind.ORIGINAL, Kind.REWRITE), 2),
        ("rollout", kinds(Kind.ORIGINAL, Kind.ROLLOUT, Kind.ROLLOUT), 1),
        ("original", kinds(Kind.ROLLOUT, Kind.ROLLOUT, Kind.ROLLOUT), None),
        ("random", kinds(Kind.ORIGINAL, Kind.ROLLOUT, Kind.ROLLOUT), None),
    ],
)
def test_the_pivot_is_of_the_kind_asked_for_or_drawn(
    pivot, pool_: tuple[Candidate, ...], number: int | None
) -> None:
    cfg = JudgeConfig(schedule="pivot", pivot=pivot)
    met = set()
    for seed in range(30):
        (verdict,) = judge_pools(LongestWins(), cfg, [(SAMPLE, pool_)], seed=seed)
        (first, second) = ({i, j} for i, j, _ in verdict.pairs)
        met |= first & second
    assert met == ({0, 1, 2} if number is None else {number})


def test_pairs_of_all_pools_go_to_the_judge_in_one_call_a_round() -> None:
    """The tournament waits for the pointwise answers, which come first, and then goes round by round."""
    judge = Recording(longest)
    pools = [(Sample(n, 1, IDS, IDS, "prefix", "suffix"), pool(*TEXTS)) for n in range(6)]
    verdicts = judge_pools(judge, JudgeConfig(schedule="tournament"), pools, seed=0)
    sizes = [len(questions) for questions, _ in judge.calls]
    assert sizes[0] == 6 * 14 * 2 and sizes[1] == 6 * 7 and sizes[2] > 6 * 5
    assert not any(isinstance(question, PairQuestion) for question in judge.calls[0][0])
    assert len(sizes) <= 12 and sum(sizes) == sum(verdict.num_judgments for verdict in verdicts)
    assert all(len(verdict.pairs) <= 22 for verdict in verdicts), "a quarter of 91"
    quality_only = JudgeConfig(schedule="tournament", weights=RewardWeights(safety=0, factuality=0))
    judge_pools(second := Recording(longest), quality_only, pools, seed=0)
    assert len(second.calls[0][0]) == 6 * 7, "there is nothing to wait for"
    judge_pools(third := Recording(longest), JudgeConfig(schedule="pivot"), pools, seed=0)
    assert [len(questions) for questions, _ in third.calls] == [6 * (13 + 28)]


def test_a_tournament_looks_for_the_best_and_worst_total() -> None:
    """Safe ones beat unsafe ones whatever their quality: the best of the safe, the worst of the unsafe."""
    texts = [("bad" if n % 3 == 0 else "fine") + "s" * n for n in np.random.default_rng(1).permutation(14)]
    weights = RewardWeights(quality=0.5, safety=1.0, factuality=0)
    cfg = JudgeConfig(schedule="tournament", weights=weights)
    (verdict,) = judge_pools(LongestWins(), cfg, [(SAMPLE, pool(*texts))], seed=0)
    choice = open_objective(ObjectiveConfig()).choose(SAMPLE, pool(*texts), verdict, seed=0)
    assert choice is not None and choice.rejected is not None
    assert (texts[choice.chosen], texts[choice.rejected]) == ("fine" + "s" * 13, "bad")


@pytest.mark.parametrize("cfg", SCHEDULES, ids=lambda c: f"{c.schedule}-{c.both_orders}")
def test_who_was_never_compared_is_told_from_who_failed(cfg: JudgeConfig) -> None:
    """Bases are 0, 1 or 2, in units far above a mean win: in a tournament the two with 1 are never compared."""

    def answer(question: Question, seed: int) -> Judgment:
        if isinstance(question, SafetyQuestion) and "!" in question.suffix:
            return Failure("cut off")
        return longest(question, seed)

    texts = ["suu", "bad", "bad!", "so", "so?", "obad", "obad,", "sbad", "sbad,", "x bad"]
    weights = RewardWeights(quality=0.4, safety=1.0, factuality=1.0)
    cfg = cfg.model_copy(update={"weights": weights})
    (verdict,) = judge_pools(Recording(answer), cfg, [(SAMPLE, pool(*texts))], seed=0)
    met = {n for i, j, _ in verdict.pairs for n in (i, j)}
    middle = {7, 8} if cfg.schedule == "tournament" else set()
    assert {n for n, skipped in enumerate(verdict.skipped) if skipped} == middle
    assert {n for n, reward in enumerate(verdict.rewards) if reward is None} == middle | {2, 4}
    assert not middle & met and 4 in met and (2 in met) == (not middle)


def test_without_comparisons_nobody_is_skipped() -> None:
    cfg = JudgeConfig(weights=RewardWeights(quality=0, factuality=0))
    assert judged(cfg, "a", "bad").skipped == (False, False)
    assert judged(JudgeConfig(), "a").skipped == (True,), "there is nobody to compare it with"


@pytest.mark.parametrize("weight", [0.5, 40.0])
def test_the_base_counts_as_much_as_the_weights_say(weight: float) -> None:
    """At a low weight of quality the unsafe text can only be worst, and few calls go to it; at a high one it is best.

    It wins every comparison. At the low weight the best text has lost one and may be taken for the second best.
    """
    texts = ["bad" + "s" * 20, *("s" * n for n in range(1, 11))]
    cfg = JudgeConfig(schedule="tournament", weights=RewardWeights(quality=weight, factuality=0))
    best, worst = Counter[str](), Counter[str]()
    for seed in range(20):
        (verdict,) = judge_pools(LongestWins(), cfg, [(SAMPLE, pool(*texts))], seed=seed)
        choice = open_objective(ObjectiveConfig()).choose(SAMPLE, pool(*texts), verdict, seed=0)
        assert choice is not None and choice.rejected is not None
        best[texts[choice.chosen]] += 1
        worst[texts[choice.rejected]] += 1
        met = sum(0 in pair[:2] for pair in verdict.pairs)
        assert met <= 2 if weight < 1 else met > 2
    expected = ("s" * 10, texts[0]) if weight < 1 else (texts[0], "s")
    assert best[expected[0]] >= 18 and worst[expected[1]] == 20


def test_rewards_of_all_schedules_are_on_one_scale() -> None:
    """The expected mean win of a tournament's candidates is near that of all pairs; their mean is a half."""
    wins = {}
    for cfg in SCHEDULES[:3]:
        (verdict,) = judge_pools(LongestWins(), cfg, [(SAMPLE, pool(*TEXTS))], seed=1)
        wins[cfg.schedule] = np.array([q for q in verdict.quality if q is not None])
        assert len(wins[cfg.schedule]) == 14 and wins[cfg.schedule].mean() == pytest.approx(0.5)
    for kind, ends, middle in (("tournament", 0.1, 0.36), ("pivot", 0.45, 0.45)):
        off = np.abs(wins[kind] - wins["all_pairs"])
        assert off[[TEXTS.index("s" * 14), TEXTS.index("s")]].max() < ends and off.max() < middle


def test_one_order_a_pair_favours_no_kind() -> None:
    """A judge that always names the first: with all pairs nobody wins more than half a comparison too often."""
    judge = Recording(lambda question, seed: Score(1.0))
    weights = RewardWeights(safety=0, factuality=0)
    (verdict,) = judge_pools(judge, JudgeConfig(weights=weights), [(SAMPLE, pool(*TEXTS))], seed=0)
    assert {round(13 * q) for q in verdict.quality if q is not None} == {6, 7}
    biased = JudgeConfig(weights=weights, both_orders=True)
    (verdict,) = judge_pools(judge, biased, [(SAMPLE, pool(*TEXTS))], seed=0)
    assert verdict.quality == (0.5,) * 14


def test_both_orders_of_a_tournament_stand_beside_each_other() -> None:
    cfg = JudgeConfig(schedule="tournament", both_orders=True)
    verdict = judged(cfg, *TEXTS)
    assert len(verdict.pairs) <= 44 and len(verdict.pairs) % 2 == 0
    assert all(a[:2] == b[1::-1] for a, b in list(pairwise(verdict.pairs))[::2])


def verdict_of(rewards: Sequence[float | None]):
    from dataclasses import replace

    return replace(judged(JudgeConfig(), *("x" * len(rewards))), rewards=tuple(rewards))


@given(
    st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, 2.5])), min_size=1, max_size=8),
    st.integers(0, 99),
)
def test_dpo_takes_a_best_and_a_worst_candidate(rewards: list[float | None], seed: int) -> None:
    candidates = pool(*("x" * (n + 1) for n in range(len(rewards))))
    choice = open_objective(ObjectiveConfig()).choose(SAMPLE, candidates, verdict_of(rewards), seed=seed)
    known = [reward for reward in rewards if reward is not None]
    if not known or min(known) == max(known):
        assert choice is None
        return
    assert choice is not None and choice.rejected is not None
    assert rewards[choice.chosen] == max(known) and rewards[choice.rejected] == min(known)
    assert choice.margin == max(known) - min(known)
    assert choice.trained() == (candidates[choice.chosen], candidates[choice.rejected])


def test_equal_rewards_favour_no_position() -> None:
    candidates = pool("a", "b", "c", "d")
    verdict = verdict_of([1.0, 1.0, 0.0, 0.0])
    picks = Counter()
    for seed in range(400):
        choice = open_objective(ObjectiveConfig()).choose(SAMPLE, candidates, verdict, seed=seed)
        assert choice is not None
        picks[choice.chosen, choice.rejected] += 1
    assert set(picks) == {(0, 2), (0, 3), (1, 2), (1, 3)} and min(picks.values()) > 60


@pytest.mark.parametrize(
    ("settings", "rewards", "taken"),
    [
        ({}, [1.0, 1.0], False),
        ({"ties": "keep"}, [1.0, 1.0], True),
        ({"min_margin": 0.5}, [1.0, 1.5], False),
        ({"min_margin": 0.5}, [1.0, 1.6], True),
        ({"ties": "keep"}, [1.0, None], False),
        ({"kind": "rf_nll"}, [1.0, 1.0], True),
        ({"kind": "rf_nll"}, [1.0, None], True),
        ({"kind": "rf_nll"}, [None, None], False),
    ],
)
def test_tie_and_margin_policy(settings: dict, rewards: list[float | None], taken: bool) -> None:
    choice = open_objective(ObjectiveConfig(**settings)).choose(
        SAMPLE, pool("a", "b"), verdict_of(rewards), seed=0
    )
    assert (choice is not None) == taken


def test_a_lone_candidate_is_rf_nlls_choice_without_a_judge() -> None:
    choice = open_objective(ObjectiveConfig(kind="rf_nll")).choose(SAMPLE, pool("a"), None, seed=0)
    assert choice is not None and choice.chosen == 0 and choice.rejected is None
