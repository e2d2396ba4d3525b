"""From judgments to choices: rewards, ties, margins, failures that are dropped and never scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sip_engine.config import JudgeConfig, ObjectiveConfig, RewardWeights
from sip_engine.judging import judge_pools
from sip_engine.objectives import choose
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
    choice = choose(ObjectiveConfig(), SAMPLE, pool("one", "three", "??"), verdict, seed=0)
    assert choice is not None and (choice.chosen, choice.rejected) == (1, 0)


def verdict_of(rewards: Sequence[float | None]):
    from dataclasses import replace

    return replace(judged(JudgeConfig(), *("x" * len(rewards))), rewards=tuple(rewards))


@given(
    st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, 2.5])), min_size=1, max_size=8),
    st.integers(0, 99),
)
def test_dpo_takes_a_best_and_a_worst_candidate(rewards: list[float | None], seed: int) -> None:
    candidates = pool(*("x" * len(rewards)))
    choice = choose(ObjectiveConfig(), SAMPLE, candidates, verdict_of(rewards), seed)
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
        choice = choose(ObjectiveConfig(), SAMPLE, candidates, verdict, seed)
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
    choice = choose(ObjectiveConfig(**settings), SAMPLE, pool("a", "b"), verdict_of(rewards), seed=0)
    assert (choice is not None) == taken


def test_a_lone_candidate_is_rf_nlls_choice_without_a_judge() -> None:
    choice = choose(ObjectiveConfig(kind="rf_nll"), SAMPLE, pool("a"), None, seed=0)
    assert choice is not None and choice.chosen == 0 and choice.rejected is None
