"""One update: rows are packed, their log-probs become the objective's loss, its gradient a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from sip_engine.objectives.base import Objective
from sip_engine.objectives.document_term import add_document_term
from sip_engine.policy.packing import PackedRows
from sip_engine.policy.policy import Policy, UpdateStats
from sip_engine.policy.reference import Reference
from sip_engine.policy.rows import LossSums, Row, documents_of

_STAND_IN = Row(np.zeros(1, np.int32), (np.zeros(1, np.int32),))
"""The row of a process that has none, of weight 0, so that it takes part in the others' collectives."""


def update(
    policy: Policy,
    reference: Reference | None,
    rows: Sequence[Row],
    objective: Objective,
    check: Callable[[Mapping[str, float]], None] = lambda sums: None,
) -> UpdateStats:
    """Make one optimizer step on this process' rows; without any on all processes, nothing is updated.

    `sums` and `maxima` of the result hold what the objective logs and, of sampled tokens, `drift_sum`,
    `drift_tokens` and `drift_max`: |trainer - sampler| log-prob, nats. Documents' own suffixes in the rows add their
    term to the objective's loss (`objectives.document_term`). `check` sees the sums
    before the step is made.

    Raises:
        NonFiniteError: before anything is updated, on every process.
    """
    batches = policy.micro_batches(rows or [_STAND_IN])
    shown = [batch.without_documents() for batch in batches]
    referred: Sequence[Tensor] = []
    if objective.needs_reference:
        assert reference is not None, "this objective needs a reference policy"
        referred = reference.score([seen for seen, _ in shown])

    def loss(log_probs: Tensor, packed: PackedRows, number: int) -> LossSums:
        if not rows:
            return LossSums(0.0 * log_probs.sum(), 0)
        seen, kept = shown[number]
        own = log_probs if kept is None else log_probs[kept]
        found = objective.loss(own, seen, referred[number] if referred else None)
        if seen.sampled is not None:
            found = _with_drift(found, own.detach(), seen.sampled)
        return found if kept is None else add_document_term(found, log_probs, packed)

    return policy.update(batches, loss, documents_of(rows), check)


def _with_drift(found: LossSums, log_probs: Tensor, sampled: Tensor) -> LossSums:
    """The loss with how far trainer and sampler are apart on the tokens that were sampled (the others are NaN)."""
    known = ~sampled.isnan()
    gap = (log_probs - sampled).abs().masked_fill(~known, 0.0)
    drift = {"drift_sum": gap.double().sum(), "drift_tokens": known.sum()}
    largest = {"drift_max": gap.max()} if len(gap) else {}
    return found._replace(sums={**drift, **found.sums}, maxima={**largest, **found.maxima})
