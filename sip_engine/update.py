"""One update: choices become packed rows, their log-probs the objective's loss, its gradient a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sip_engine.config import ObjectiveConfig
from sip_engine.objectives import PAIRED, Choice, dpo_diagnostics, dpo_losses, nll_losses
from sip_engine.policy.packing import PackedRows, Row
from sip_engine.policy.policy import Policy, UpdateStats
from sip_engine.policy.reference import Reference
from sip_engine.types import Sample

_NOTHING = np.zeros(1, np.int32)


@dataclass(frozen=True)
class TrainingRows:
    """Rows of one process and, for each, the sampler's log-probs of their suffixes (None: not sampled).

    `real` is False when this process had nothing to train on and holds a stand-in row of weight 0, so
    that it still takes part in the others' collectives.
    """

    rows: tuple[Row, ...]
    sampled: tuple[tuple[np.ndarray | None, ...], ...]
    real: bool
    documents: str


def rows_of_choices(choices: Sequence[Choice], paired: bool) -> TrainingRows:
    """One row a choice: the prefix and its trained candidates."""
    if not choices:
        return TrainingRows(
            (Row(_NOTHING, (_NOTHING,) * (1 + paired)),), ((None,) * (1 + paired),), False, "none"
        )
    rows = tuple(Row(c.sample.prefix_ids, tuple(k.ids for k in c.trained())) for c in choices)
    sampled = tuple(tuple(k.logprobs for k in c.trained()) for c in choices)
    return TrainingRows(rows, sampled, True, _names([c.sample for c in choices]))


def rows_of_samples(samples: Sequence[Sample], loss_on: str) -> TrainingRows:
    """One row a sample for next-token training, on its suffix or on every token."""
    if loss_on == "all":
        empty = np.zeros(0, np.int32)
        rows = tuple(Row(empty, (np.concatenate([s.prefix_ids, s.suffix_ids]),)) for s in samples)
    else:
        rows = tuple(Row(s.prefix_ids, (s.suffix_ids,)) for s in samples)
    return TrainingRows(rows, ((None,),) * len(rows), True, _names(samples))


def update(
    policy: Policy, reference: Reference | None, training: TrainingRows, cfg: ObjectiveConfig
) -> UpdateStats:
    """Make one optimizer step. `sums` of the result hold `units` and what the objective logs.

    Raises:
        NonFiniteError: before anything is updated, on every process.
    """
    batches = policy.micro_batches(training.rows)
    sampled = _sampled_targets(training, batches)
    paired = cfg.kind in PAIRED
    if paired:
        assert reference is not None, "DPO needs a reference policy"
        ref_sums = [
            rows.sum_by_suffix(lp) for rows, lp in zip(batches, reference.score(batches), strict=False)
        ]
    else:
        ref_sums = []

    def loss(log_probs: Tensor, rows: PackedRows, number: int) -> tuple[Tensor, int, dict[str, float]]:
        if not training.real:
            return 0.0 * log_probs.sum(), 0, {}
        logged = _drift(log_probs.detach(), sampled[number])
        if not paired:
            losses = nll_losses(log_probs)
            return losses.sum(), len(losses), logged
        loss_sum, pairs, extra = _paired_loss(log_probs, rows, ref_sums[number], cfg)
        return loss_sum, pairs, {**logged, **extra}

    return policy.update(batches, loss, training.documents)


def _paired_loss(
    log_probs: Tensor, rows: PackedRows, ref_sums: Tensor, cfg: ObjectiveConfig
) -> tuple[Tensor, int, dict[str, float]]:
    lens = torch.tensor(rows.target_lens, device=log_probs.device).view(-1, 2)
    policy_sums = rows.sum_by_suffix(log_probs).view(-1, 2)
    reference_sums = ref_sums.view(-1, 2)
    chosen_nll = -policy_sums[:, 0] / lens[:, 0]
    if cfg.length_normalised:
        policy_sums, reference_sums = policy_sums / lens, reference_sums / lens
    (chosen, rejected), (ref_chosen, ref_rejected) = policy_sums.unbind(1), reference_sums.unbind(1)
    losses = dpo_losses(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
    if cfg.nll_weight:
        losses = losses + cfg.nll_weight * chosen_nll
    diagnostics = dpo_diagnostics(policy_sums.detach(), reference_sums, cfg.beta)
    return losses.sum(), len(losses), {"pairs": float(len(losses)), **diagnostics}


def _sampled_targets(training: TrainingRows, batches: Sequence[PackedRows]) -> list[Tensor]:
    """[num_targets] float32 a micro-batch: the sampler's log-prob of each target, NaN where not sampled."""
    flat = []
    for row, sampled in zip(training.rows, training.sampled, strict=True):
        for suffix, logprobs in zip(row.suffixes, sampled, strict=True):
            scored = len(suffix) if len(row.prefix) else len(suffix) - 1
            flat.append(np.full(scored, np.nan, np.float32) if logprobs is None else logprobs)
    values = torch.from_numpy(np.concatenate(flat))
    return [
        part.to(b.tokens.device)
        for part, b in zip(values.split([len(b.targets) for b in batches]), batches, strict=True)
    ]


def _drift(log_probs: Tensor, sampled: Tensor) -> dict[str, float]:
    """Sums of |trainer - sampler| log-prob over sampled tokens, and how many those are."""
    known = ~sampled.isnan()
    gap = (log_probs - sampled)[known].abs()
    largest = gap.max().item() if len(gap) else 0.0
    return {"drift_sum": gap.double().sum().item(), "drift_tokens": float(known.sum()), "drift_max": largest}


def _names(samples: Sequence[Sample]) -> str:
    """Documents of a batch, for error messages: a few in full, the rest counted."""
    shown = ", ".join(str(s.document) for s in samples[:8])
    return shown if len(samples) <= 8 else f"{shown} and {len(samples) - 8} more"
