"""Supervised baselines: the likelihood of the rewrite, or of one rollout, without a judge (method §updates)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sip_engine.objectives.base import Objective, first_of
from sip_engine.types import Candidate, Choice, Kind, Sample, Verdict


class _KindSFT(Objective):
    """The first candidate of one kind."""

    kind: ClassVar[Kind]

    def choose(
        self, sample: Sample, pool: Sequence[Candidate], verdict: Verdict | None, *, seed: int
    ) -> Choice | None:
        found = first_of(pool, self.kind)
        return None if found is None else Choice(sample, tuple(pool), found)


class RewriteSFT(_KindSFT):
    """Train on rewrites."""

    kind = Kind.REWRITE
    needs_kinds = (kind,)


class RolloutSFT(_KindSFT):
    """Train on one rollout; the paper saw this collapse to safe but meaningless text."""

    kind = Kind.ROLLOUT
    needs_kinds = (kind,)
