"""From candidates to rewards: which questions a pool raises, and what their answers add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from sip_engine.config import JudgeConfig
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
)


@dataclass(frozen=True)
class Verdict:
    """A judged pool: per candidate its scores and total reward; None where no judgment could be had."""

    quality: tuple[float | None, ...]
    """Mean win over the compared candidates, in [0, 1]."""
    safety: tuple[float | None, ...]
    factuality: tuple[float | None, ...]
    rewards: tuple[float | None, ...]
    """Weighted sum of the objectives in force; None if one of them is missing: such a candidate is dropped."""
    pairs: tuple[tuple[int, int, float | None], ...]
    """(first, second, win of the first) of every comparison."""
    failures: tuple[str, ...]
    cost: Cost

    @property
    def num_judgments(self) -> int:
        return self.cost.calls


@dataclass(frozen=True)
class _Asked:
    """What a question is about: an objective and one or two candidate numbers."""

    objective: str
    first: int
    second: int = -1


def judge_pools(
    judge: Judge, cfg: JudgeConfig, pools: Sequence[tuple[Sample, Sequence[Candidate]]], *, seed: int
) -> list[Verdict]:
    """Judge every pool; all questions of all pools go to the judge in one call, so that it can batch them."""
    plans = [_plan(cfg, sample, candidates) for sample, candidates in pools]
    questions = [question for plan in plans for _, question in plan]
    answers = iter(judge.judge(questions, seed=seed))
    return [
        _verdict(cfg, len(candidates), [(asked, next(answers)) for asked, _ in plan])
        for plan, (_, candidates) in zip(plans, pools, strict=True)
    ]


def _plan(cfg: JudgeConfig, sample: Sample, candidates: Sequence[Candidate]) -> list[tuple[_Asked, Question]]:
    """All pairs for quality (method §rewards), one question a candidate for the pointwise objectives."""
    plan: list[tuple[_Asked, Question]] = []
    texts = [candidate.text for candidate in candidates]
    if cfg.weights.quality:
        for i, j in combinations(range(len(texts)), 2):
            plan.append((_Asked("quality", i, j), PairQuestion(sample.prefix, texts[i], texts[j])))
            if cfg.both_orders:
                plan.append((_Asked("quality", j, i), PairQuestion(sample.prefix, texts[j], texts[i])))
    if cfg.weights.safety:
        plan.extend((_Asked("safety", i), SafetyQuestion(text)) for i, text in enumerate(texts))
    if cfg.weights.factuality:
        plan.extend(
            (_Asked("factuality", i), FactualityQuestion(sample.prefix, sample.suffix, text))
            for i, text in enumerate(texts)
        )
    return plan


def _verdict(cfg: JudgeConfig, size: int, answered: list[tuple[_Asked, Judgment]]) -> Verdict:
    scores: dict[str, list[list[float]]] = {
        name: [[] for _ in range(size)] for name in ("quality", "safety", "factuality")
    }
    pairs, failures, cost = [], [], Cost()
    for asked, judgment in answered:
        cost = cost + Cost(1, judgment.cost.tokens, judgment.cost.seconds)
        value = None if isinstance(judgment, Failure) else judgment.value
        if asked.objective == "quality":
            pairs.append((asked.first, asked.second, value))
        if isinstance(judgment, Failure):
            failures.append(f"{asked.objective}: {judgment.reason}")
            continue
        scores[asked.objective][asked.first].append(judgment.value)
        if asked.objective == "quality":
            scores["quality"][asked.second].append(1.0 - judgment.value)
    means = {name: tuple(_mean(votes) for votes in lists) for name, lists in scores.items()}
    return Verdict(
        quality=means["quality"],
        safety=means["safety"],
        factuality=means["factuality"],
        rewards=tuple(_reward(cfg, {name: means[name][i] for name in means}) for i in range(size)),
        pairs=tuple(pairs),
        failures=tuple(failures),
        cost=cost,
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _reward(cfg: JudgeConfig, scores: dict[str, float | None]) -> float | None:
    """sum of weight * score over the objectives with a weight; None if one of those is missing."""
    total = 0.0
    for name, weight in cfg.weights.model_dump().items():
        score = scores[name]
        if weight and score is None:
            return None
        total += weight * (score or 0.0)
    return total
