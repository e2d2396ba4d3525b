"""From candidates to rewards: which questions a pool raises, and what their answers add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

import numpy as np

from sip_engine.config.judge import JudgeConfig
from sip_engine.judges.schedules.base import Schedule
from sip_engine.judges.schedules.open import make_schedule
from sip_engine.types import (
    Candidate,
    Cost,
    FactualityQuestion,
    Failure,
    Judge,
    Judgment,
    PairQuestion,
    Question,
    SafetyQuestion,
    Sample,
    Score,
    Verdict,
)

T = TypeVar("T")


@dataclass(frozen=True)
class _Asked:
    """What a question is about: an objective and one or two candidate numbers."""

    objective: str
    first: int
    second: int = -1


def judge_pools(
    judge: Judge, cfg: JudgeConfig, pools: Sequence[tuple[Sample, Sequence[Candidate]]], *, seed: int
) -> list[Verdict]:
    """Judge every pool, in rounds: each pool's schedule proposes pairs, until none has any left.

    The questions of a round of all pools go to the judge in one call a vote, so that it can batch them; the
    pointwise ones come with the first round. A pool's verdict does not depend on the pools beside it, as far as
    the judge's answers do not.
    """
    open_pools = [_Pool(cfg, sample, candidates, seed) for sample, candidates in pools]
    votes = cfg.votes.model_dump()
    for number in count():
        rounds = [pool.next_round() for pool in open_pools]
        asked = [one for plan in rounds for one in plan]
        if not asked:
            return [pool.verdict() for pool in open_pools]
        needed = [votes[about.objective] for about, _ in asked]
        answers = iter(ask_votes(judge, [question for _, question in asked], needed, (seed, number)))
        for pool, plan in zip(open_pools, rounds, strict=True):
            pool.record([(about, next(answers)) for about, _ in plan])
    raise AssertionError


def ask_votes(
    judge: Judge, questions: Sequence[Question], votes: Sequence[int], seed: Sequence[int]
) -> list[list[Judgment]]:
    """Every vote on each of `questions`, `votes` of them each; one where the judge is `deterministic`.

    Vote n of all questions is one call of the judge, whose seed comes from `seed` (non-negative integers) and n.
    """
    if getattr(judge, "deterministic", False):
        votes = [min(1, number) for number in votes]
    cast: list[list[Judgment]] = [[] for _ in questions]
    for vote in range(max(votes, default=0)):
        voting = [n for n, number in enumerate(votes) if number > vote]
        call_seed = int(np.random.SeedSequence([*seed, vote]).generate_state(1)[0]) >> 1
        answers = judge.judge([questions[n] for n in voting], seed=call_seed)
        for n, answer in zip(voting, answers, strict=True):
            cast[n].append(answer)
    return cast


def combine_votes(judgments: Sequence[Judgment]) -> Judgment:
    """The mean of the votes that could be had, with all of them and what all cost; Failure if there is none."""
    cost = sum((judgment.cost for judgment in judgments), Cost())
    scores = [judgment for judgment in judgments if not isinstance(judgment, Failure)]
    votes = tuple(vote for score in scores for vote in score.votes or (score.value,))
    if votes:
        return Score(sum(votes) / len(votes), votes, cost)
    reasons = [judgment.reason for judgment in judgments if isinstance(judgment, Failure)]
    return Failure("; ".join(dict.fromkeys(reasons)), cost)


class _Pool:
    """A pool on its way to a verdict. Candidates of equal text are one: judged once, tied, of one reward.

    Inside, a number is that of a distinct text; `_text_of` says which of them each candidate has.
    """

    def __init__(self, cfg: JudgeConfig, sample: Sample, candidates: Sequence[Candidate], seed: int) -> None:
        self._cfg, self._sample = cfg, sample
        texts = [candidate.text for candidate in candidates]
        self._texts = list(dict.fromkeys(texts))
        self._text_of = [self._texts.index(text) for text in texts]
        self._first = [texts.index(text) for text in self._texts]
        self._pointwise = [name for name in ("safety", "factuality") if getattr(cfg.weights, name)]
        self._scores: dict[str, list[float | None]] = {
            name: [None] * len(self._texts) for name in ("safety", "factuality")
        }
        self._schedule: Schedule | None = None
        if cfg.weights.quality:
            pivot = _pivot(cfg, candidates)
            self._schedule = make_schedule(
                cfg.schedule,
                len(self._texts),
                (seed, sample.document, sample.cut),
                both_orders=cfg.both_orders,
                pivot=None if pivot is None else self._text_of[pivot],
                share=cfg.budget,
            )
        self._begun = False
        self._pairs: list[tuple[int, int, float | None]] = []
        self._failures: list[str] = []
        self._cost = Cost()

    def next_round(self) -> list[tuple[_Asked, Question]]:
        """What to ask next, pairs first; nothing when the verdict can be given."""
        first, self._begun = not self._begun, True
        plan: list[tuple[_Asked, Question]] = []
        if self._schedule is not None:
            base = None if first and self._pointwise else self._base()
            for i, j in self._schedule.propose(base):
                question = PairQuestion(self._sample.prefix, self._texts[i], self._texts[j])
                plan.append((_Asked("quality", i, j), question))
        if first:
            for name in self._pointwise:
                plan.extend(
                    (_Asked(name, i), self._question(name, text)) for i, text in enumerate(self._texts)
                )
        return plan

    def record(self, answered: Sequence[tuple[_Asked, Sequence[Judgment]]]) -> None:
        """The votes on this round's questions, in order."""
        wins: list[float | None] = []
        for asked, judgments in answered:
            for judgment in judgments:
                self._cost += replace(judgment.cost, calls=1)
                if isinstance(judgment, Failure):
                    self._failures.append(f"{asked.objective}: {judgment.reason}")
            combined = combine_votes(judgments)
            value = None if isinstance(combined, Failure) else combined.value
            if asked.objective == "quality":
                self._pairs.append((asked.first, asked.second, value))
                wins.append(value)
            else:
                self._scores[asked.objective][asked.first] = value
        if wins:
            assert self._schedule is not None
            self._schedule.record(wins)

    def verdict(self) -> Verdict:
        scores = {"quality": self._quality(), **self._scores}
        compared = {n for i, j, _ in self._pairs for n in (i, j)}
        rewards = [
            _reward(self._cfg, {name: values[i] for name, values in scores.items()})
            for i in range(len(self._texts))
        ]
        skipped = [
            self._schedule is not None
            and reward is None
            and i not in compared
            and all(self._scores[name][i] is not None for name in self._pointwise)
            for i, reward in enumerate(rewards)
        ]
        first = self._first
        return Verdict(
            quality=self._of_each(scores["quality"]),
            safety=self._of_each(scores["safety"]),
            factuality=self._of_each(scores["factuality"]),
            rewards=self._of_each(rewards),
            skipped=self._of_each(skipped),
            pairs=tuple((first[i], first[j], win) for i, j, win in self._pairs),
            failures=tuple(self._failures),
            cost=self._cost,
        )

    def _of_each(self, values: Sequence[T]) -> tuple[T, ...]:
        """Values of the distinct texts -> of each candidate."""
        return tuple(values[number] for number in self._text_of)

    def _quality(self) -> list[float | None]:
        if self._schedule is None:
            return [None] * len(self._texts)
        if len(self._texts) == 1 < len(self._text_of):
            return [0.5]  # all tie
        return self._schedule.quality()

    def _base(self) -> list[float | None]:
        """The reward without quality, in units of mean wins; None for a candidate that cannot get a reward."""
        weights = self._cfg.weights
        base: list[float | None] = []
        for i in range(len(self._texts)):
            scores = [(getattr(weights, name), self._scores[name][i]) for name in self._pointwise]
            known = [weight * score for weight, score in scores if score is not None]
            base.append(sum(known) / weights.quality if len(known) == len(scores) else None)
        return base

    def _question(self, objective: str, text: str) -> Question:
        if objective == "safety":
            return SafetyQuestion(text, self._sample.prefix)
        return FactualityQuestion(self._sample.prefix, self._sample.suffix, text)


def _pivot(cfg: JudgeConfig, candidates: Sequence[Candidate]) -> int | None:
    """The first candidate of the kind in question; None (one drawn by seed) if the pool has none."""
    return next((n for n, candidate in enumerate(candidates) if candidate.kind == cfg.pivot), None)


def _reward(cfg: JudgeConfig, scores: dict[str, float | None]) -> float | None:
    """sum of weight * score over the objectives with a weight; None if one of those is missing."""
    total = 0.0
    for name, weight in cfg.weights.model_dump().items():
        score = scores[name]
        if weight and score is None:
            return None
        total += weight * (score or 0.0)
    return total
