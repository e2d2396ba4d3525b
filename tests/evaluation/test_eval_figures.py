"""The figures of an evaluation, counted by hand for a policy, a judge and a measure with known answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from sip_engine.config.judge import JudgeConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.held_out import diversity, diversity_beside, evaluate, interleave
from sip_engine.evaluation.intervals import wilson
from sip_engine.judges.distributed import ReplicaJudge
from sip_engine.policy.packing import PackedRows, pack_rows
from sip_engine.policy.rows import Row
from sip_engine.types import (
    Candidate,
    FactualityQuestion,
    Failure,
    Judgment,
    PairQuestion,
    Question,
    SafetyQuestion,
    Sample,
    Score,
)

TEXTS = ["good", "bad", "good", "fair", "??", "good"]
RIVALS = ["bad", "good", "good", "good", "good", "??"]
"""Wins: yes, no, tie, half (order decides), failure, failure."""


class Ids:
    """A tokenizer for decoding only: ids are letters."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class Letters:
    """A policy that gives token t the log-prob -t / 100 and writes what it is told."""

    mesh: Mesh

    def micro_batches(self, rows: Sequence[Row]) -> list[PackedRows]:
        return [pack_rows(rows[i : i + 2], self.mesh.device) for i in range(0, len(rows), 2)]

    def score(self, batches: Sequence[PackedRows]) -> list[torch.Tensor]:
        return [-batch.targets.float() / 100 for batch in batches]

    def generate(self, requests: Sequence[Any], params: Any) -> list[list[Candidate]]:
        assert params.greedy and params.max_new_tokens == 6
        texts = [TEXTS[r.document] for r in requests]
        return [[Candidate("rollout", 0, np.array([ord(c) for c in t], np.int32), t)] for t in texts]  # type: ignore[arg-type]


class Marks:
    """Prefers good over bad; between fair and anything the first one; knows nothing about ??."""

    name = "marks"
    deterministic = True

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Judgment:
        match question:
            case PairQuestion(_, first, second):
                if "??" in (first, second):
                    return Failure("unreadable")
                if "fair" in (first, second):
                    return Score(1.0)
                return Score(0.5 if first == second else float(first == "good"))
            case SafetyQuestion(suffix):
                return Score(float(suffix != "bad"))
            case FactualityQuestion(prefix, reference, suffix):
                assert (prefix, reference) == ("p", "the original")
                return (
                    Failure("unsure")
                    if suffix == "bad"
                    else Score({"good": 1.0, "fair": 0.25}.get(suffix, 0.5))
                )


@pytest.fixture
def samples() -> list[Sample]:
    return [
        Sample(n, 0, np.array([1, 2], np.int32), np.arange(n, n + size, dtype=np.int32), "p", "the original")
        for n, size in enumerate((6, 1, 2, 3, 4, 5))
    ]


def coherent(prefix: str, suffix: str) -> dict[str, float]:
    return {"coherence": {"good": 0.9, "fair": 0.6, "bad": 0.3}.get(suffix, 0.0), "other": 2.0}


def test_figures_are_those_counted_by_hand(mesh: Mesh, samples: list[Sample]) -> None:
    policy: Any = Letters(mesh)
    tokenizer: Any = Ids()
    found = evaluate(policy, policy, samples, tokenizer, Marks(), JudgeConfig(), RIVALS, coherent)
    nats = [token / 100 for s in samples for token in s.suffix_ids]
    wanted = {
        "heldout_loss": sum(nats) / len(nats),
        "win_rate": (1.0 + 0.0 + 0.5 + 0.5) / 4,
        "safety": 5 / 6,
        "factuality": (1 + 1 + 0.25 + 0.5 + 1) / 5,
        "judge_failure_rate": (2 + 2 + 1) / 24,
        "coherence": (0.9 + 0.3 + 0.9 + 0.6 + 0.0 + 0.9) / 6,
        "coherence_win_rate": (1 + 0 + 0.5 + 0 + 0 + 1) / 6,
        "other": 2.0,
    }
    for name, value in wanted.items():
        assert found.figures[name] == pytest.approx(value), name
        assert found.estimates[name].value == pytest.approx(value), name
    assert (found.figures["safety/low"], found.figures["safety/high"]) == wilson(5, 6)
    assert found.estimates["win_rate"].n == 4 and found.estimates["factuality"].n == 5
    assert found.figures["win_rate/low"] < 0.5 < found.figures["win_rate/high"]
    assert "judge_failure_rate/low" not in found.figures
    assert found.continuations == TEXTS
    assert all(math.isfinite(value) for value in found.figures.values()), "records hold finite numbers only"


def test_against_itself_is_half_whatever_the_judge_prefers(mesh: Mesh, samples: list[Sample]) -> None:
    policy: Any = Letters(mesh)
    tokenizer: Any = Ids()
    found = evaluate(policy, policy, samples, tokenizer, Marks(), JudgeConfig(), None, coherent).figures
    assert found["win_rate"] == found["win_rate/low"] == found["win_rate/high"] == 0.5
    assert found["coherence_win_rate"] == 0.5


def test_what_a_judge_is_silent_on_is_not_asked(mesh: Mesh, samples: list[Sample]) -> None:
    """No figure and no failure: there is nothing that could have been answered."""

    class NoSafety(Marks):
        silent_on = (SafetyQuestion,)

        def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
            assert not any(isinstance(question, SafetyQuestion) for question in questions)
            return super().judge(questions)

    policy: Any = Letters(mesh)
    tokenizer: Any = Ids()
    judge = ReplicaJudge(NoSafety(), mesh)
    found = evaluate(policy, policy, samples, tokenizer, judge, JudgeConfig(), RIVALS, coherent).figures
    assert "safety" not in found and found["win_rate"] == pytest.approx(0.5)
    assert found["judge_failure_rate"] == pytest.approx((2 + 2 + 1) / 18)


def test_without_a_sampler_only_the_loss_is_measured(mesh: Mesh, samples: list[Sample]) -> None:
    policy: Any = Letters(mesh)
    tokenizer: Any = Ids()
    found = evaluate(policy, None, samples, tokenizer, Marks(), JudgeConfig(), None, coherent)
    assert set(found.figures) == {"heldout_loss", "heldout_loss/low", "heldout_loss/high"}
    assert found.continuations == []


def test_diversity_of_known_texts() -> None:
    found = diversity([np.array([1, 2, 1, 2]), np.array([1, 3]), np.array([], np.int64)])
    assert found["distinct_1"] == 3 / 6 and found["diversity"] == 3 / 4 and found["distinct_3"] == 1.0
    shares = (3 / 6, 2 / 6, 1 / 6)
    assert found["token_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert diversity([])["token_entropy"] == 0.0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_put_together_in_order(size: int) -> None:
    everything = list(range(7))
    assert interleave([everything[rank::size] for rank in range(size)]) == everything


def test_faultless_documents_have_a_loss_and_a_diversity_of_their_own(
    mesh: Mesh, samples: list[Sample]
) -> None:
    """A document is asked about whole; continuations count as far as their originals go."""

    class NoFactuality(Marks):
        silent_on = (FactualityQuestion,)

    def faultless(prefix: str, suffix: str) -> dict[str, float]:
        whole = prefix == ""
        return {"faultless": float(suffix == "pthe original" if whole else suffix == "fair")}

    policy: Any = Letters(mesh)
    tokenizer: Any = Ids()
    half = [s if s.document % 2 else replace(s, suffix="a fault") for s in samples]
    found = evaluate(policy, policy, half, tokenizer, NoFactuality(), JudgeConfig(), RIVALS, faultless)
    nats = [token / 100 for s in samples[1::2] for token in s.suffix_ids]
    assert found.figures["heldout_loss_faultless"] == pytest.approx(sum(nats) / len(nats))
    assert found.figures["heldout_loss"] != found.figures["heldout_loss_faultless"]
    assert found.table["heldout_loss_faultless"][:, 1].tolist() == [0, 1, 0, 3, 0, 5]
    assert found.figures["faultless"] == pytest.approx(1 / 6), "of continuations"
    assert found.figures["distinct_3_faultless"] == 1.0, "fai, goo, ood; nothing of the one before one token"
    none = evaluate(
        policy, policy, samples, tokenizer, Marks(), JudgeConfig(), RIVALS, lambda *_: {"faultless": 0.0}
    )
    assert not any("faultless" in name and "/" not in name and name != "faultless" for name in none.figures)
    assert "relative_diversity" not in none.figures


def test_diversity_beside_the_originals() -> None:
    ours = [np.array([1, 2, 3, 4, 5]), np.array([1, 2, 3, 9, 9, 9]), np.array([7, 7])]
    originals = [np.array([1, 2, 3, 4]), np.array([5, 6, 7, 8]), np.array([5, 6, 7])]
    found = diversity_beside(list(zip(ours, originals, strict=True)))
    # 123 234 | 123 239 | none, beside 123 234 | 567 678 | 567
    assert found == {
        "distinct_3_faultless": 3 / 4,
        "distinct_3_originals": 4 / 5,
        "relative_diversity": pytest.approx(15 / 16),
    }
    assert diversity_beside([]) == diversity_beside([(np.arange(5), np.arange(2))]) == {}
