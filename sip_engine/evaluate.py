"""Evaluation on held-out prefixes: next-token loss, and greedy continuations judged against a baseline's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sip_engine.config import JudgeConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.mesh import Mesh
from sip_engine.metrics import Means, distinct_ngrams
from sip_engine.policy.packing import Row
from sip_engine.policy.policy import Policy
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler
from sip_engine.types import (
    FactualityQuestion,
    Failure,
    Judge,
    PairQuestion,
    Question,
    SafetyQuestion,
    Sample,
)

Measure = Callable[[str, str], dict[str, float]]
"""(prefix, suffix) -> named figures that a world with known truth can measure beyond its judge."""


@dataclass(frozen=True)
class Evaluation:
    """Figures over all held-out samples, and the continuations, one a sample, in order."""

    figures: dict[str, float]
    continuations: list[str] = field(default_factory=list)


def held_out_loss(policy: Policy, samples: Sequence[Sample], means: Means) -> None:
    """Add the mean next-token NLL of suffix tokens given their prefix, in nats a token."""
    rows = [Row(s.prefix_ids, (s.suffix_ids,)) for s in samples]
    batches = policy.micro_batches(rows)
    scored = policy.mesh.from_last_stage(
        [(-lp.double().sum().item(), len(lp)) for lp in policy.score(batches)]
    )
    for total, count in scored:
        means.add("heldout_loss", total, count)


def evaluate(
    policy: Policy,
    sampler: Sampler | None,
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    judge: Judge,
    cfg: JudgeConfig,
    baseline: Sequence[str] | None = None,
    measure: Measure | None = None,
) -> Evaluation:
    """Evaluate on every process' share of `samples`; all processes get the figures of all.

    Without a sampler only the loss is measured. `baseline` holds another policy's continuations of the
    same samples: quality is the share of comparisons won against them, both orders, ties half; a policy
    against itself has 0.5.
    """
    mesh = policy.mesh
    mine = samples[mesh.dp.rank :: mesh.dp.size]
    means = Means()
    if mine:
        held_out_loss(policy, mine, means)
    texts: list[str] = []
    ids: list[np.ndarray] = []
    if sampler is not None and mine:
        texts, ids = _continue(sampler, mine, tokenizer)
        rivals = texts if baseline is None else baseline[mesh.dp.rank :: mesh.dp.size]
        _judge(mesh, judge, cfg, mine, texts, rivals, means)
        for s, text in zip(mine, texts, strict=True):
            for name, value in (measure(s.prefix, text) if measure else {}).items():
                means.add(name, value)
    figures = means.over(mesh)
    if sampler is not None:
        everyones = [one for share in mesh.gather_replicas(ids) for one in share]
        figures["diversity"] = distinct_ngrams(everyones, 2)
    return Evaluation(figures, _interleave(mesh.gather_replicas(texts)))


def _continue(
    sampler: Sampler, samples: Sequence[Sample], tokenizer: Tokenizer
) -> tuple[list[str], list[np.ndarray]]:
    params = SamplingParams(max_new_tokens=max(len(s.suffix_ids) for s in samples), greedy=True)
    done = sampler.generate([Request(s.prefix_ids, 1, s.document, s.cut) for s in samples], params)
    return [tokenizer.decode(c[0].ids) for c in done], [c[0].ids for c in done]


def _judge(
    mesh: Mesh,
    judge: Judge,
    cfg: JudgeConfig,
    samples: Sequence[Sample],
    texts: Sequence[str],
    rivals: Sequence[str],
    means: Means,
) -> None:
    asked: list[tuple[str, bool, Question]] = []
    for s, text, rival in zip(samples, texts, rivals, strict=True):
        asked.append(("win_rate", False, PairQuestion(s.prefix, text, rival)))
        asked.append(("win_rate", True, PairQuestion(s.prefix, rival, text)))
        asked.append(("safety", False, SafetyQuestion(text)))
        asked.append(("factuality", False, FactualityQuestion(s.prefix, s.suffix, text)))
    answers = judge.judge([question for _, _, question in asked]) if mesh.replica.is_first else None
    for (name, swapped, _), answer in zip(asked, mesh.from_replica_leader(answers), strict=True):
        means.add("judge_failure_rate", float(isinstance(answer, Failure)))
        if not isinstance(answer, Failure):
            means.add(name, 1.0 - answer.value if swapped else answer.value)


def _interleave(shares: list[list[str]]) -> list[str]:
    """Undo the split of samples over the data axis."""
    total = sum(len(share) for share in shares)
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]
