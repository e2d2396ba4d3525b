"""Reward-filtered NLL: the likelihood of the candidate of the highest reward (method §updates, RF-NLL)."""

from __future__ import annotations

from collections.abc import Sequence

from sip_engine.objectives.base import Objective, best_and_worst
from sip_engine.types import Candidate, Choice, Sample, Verdict


class RewardNLL(Objective):
    """A lone candidate is taken without a judge: a stage of originals only is plain pretraining on suffixes."""

    needs_judge = True

    def choose(
        self, sample: Sample, pool: Sequence[Candidate], verdict: Verdict | None, *, seed: int
    ) -> Choice | None:
        if len(pool) == 1:
            return Choice(sample, tuple(pool), 0)
        assert verdict is not None
        found = best_and_worst(sample, verdict.rewards, seed)
        return None if found is None else Choice(sample, tuple(pool), found[0])
