"""What a step is summed up to: shares of candidates that were skipped and dropped."""

from __future__ import annotations

import numpy as np
import pytest

from sip_engine.config.judge import JudgeConfig, RewardWeights
from sip_engine.distributed.mesh import Mesh
from sip_engine.judges.rewards import judge_pools
from sip_engine.monitoring.metrics import Means, copy_means, pool_means
from sip_engine.types import Candidate, Failure, Kind, PairQuestion, SafetyQuestion, Sample, Score

IDS = np.zeros(1, np.int32)


class Digits:
    """Prefers the higher digit; a text's safety is given by its letter: a safe, b half, c not, d fails."""

    name = "digits"

    def judge(self, questions, *, seed: int = 0):
        return [self._answer(question) for question in questions]

    def _answer(self, question):
        if isinstance(question, PairQuestion):
            if "?" in question.first + question.second:
                return Failure("no verdict")
            return Score(float(question.first[1] > question.second[1]))
        assert isinstance(question, SafetyQuestion)
        letter = question.suffix[0]
        return Failure("cut off") if letter == "d" else Score({"a": 1.0, "b": 0.5, "c": 0.0}[letter])


def test_skipped_candidates_are_not_counted_as_dropped(mesh: Mesh) -> None:
    """Of twelve, the three in the middle of a tournament are never compared, and three have a failed judgment."""
    texts = [["a1", "a2", "b3", "c4", "c5", "d6", "a?"], ["a1", "b2", "b3", "c4", "d5"]]
    pools = [[Candidate(Kind.REWRITE, n, IDS, text) for n, text in enumerate(pool)] for pool in texts]
    samples = [Sample(n, 1, IDS, IDS, "p", "s") for n in range(2)]

    def shares(schedule) -> tuple[float, float]:
        cfg = JudgeConfig(schedule=schedule, weights=RewardWeights(quality=0.25, factuality=0))
        verdicts = judge_pools(Digits(), cfg, list(zip(samples, pools, strict=True)), seed=0)
        means = Means()
        pool_means(means, pools, verdicts, [None, None])
        found = means.over(mesh)
        assert found["judge/failure_rate"] > 0
        return found["judge/skipped_candidates"], found["judge/dropped_candidates"]

    assert shares("tournament") == pytest.approx((3 / 12, 3 / 12))
    assert shares("all_pairs") == pytest.approx((0.0, 3 / 12))


def test_what_is_copied_is_counted_by_kind(mesh: Mesh) -> None:
    """Four tokens in a row are a copy, three are none; overlapping runs count each token once."""
    prefix, other = np.arange(20, dtype=np.int32), np.arange(100, 112, dtype=np.int32)
    sample = Sample(0, 1, prefix, np.concatenate([prefix[:3], other[:5]]), "p", "s")
    texts = [
        np.concatenate([other[:2], prefix[3:13], other[:4]]),
        np.concatenate([prefix[:3], other[:2], prefix[17:20]]),
        other,
    ]
    pool = [Candidate(Kind.ROLLOUT, n, ids, "") for n, ids in enumerate(texts)]
    means = Means()
    copy_means(means, [sample], [[*pool, Candidate(Kind.REWRITE, 0, prefix, "")]])
    assert means.over(mesh) == {
        "copied/document": 0.0,
        "copied/rollout": pytest.approx((10 / 16) / 3),
        "copied/rewrite": 1.0,
    }
