"""One update: choices become packed rows, their log-probs the objective's loss, its gradient a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sip_engine.config.schema import PAIRED, ObjectiveConfig
from sip_engine.kernels.dpo import dpo
from sip_engine.objectives.choose import dpo_diagnostics
from sip_engine.objectives.grpo import advantages, grpo_losses, kl_to_reference
from sip_engine.policy.packing import PackedRows, Row, row_of
from sip_engine.policy.policy import Policy, UpdateStats
from sip_engine.policy.reference import Reference
from sip_engine.sampler.requests import Completion
from sip_engine.types import Choice, Sample

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
    advantages: tuple[tuple[float, ...], ...] = ()
    """GRPO: each suffix' advantage, row by row."""


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
        rows = tuple(row_of(s) for s in samples)
    return TrainingRows(rows, ((None,),) * len(rows), True, _names(samples))


def rows_of_generations(
    samples: Sequence[Sample],
    generations: Sequence[Sequence[Completion]],
    rewards: Sequence[Sequence[float | None]],
) -> TrainingRows:
    """One row a prompt and its generations; prompts whose rewards teach nothing are left out."""
    rows, sampled, kept, known = [], [], [], []
    for sample, group, group_rewards in zip(samples, generations, rewards, strict=True):
        found = advantages(group_rewards)
        if found is not None:
            rows.append(Row(sample.prefix_ids, tuple(c.ids for c in group)))
            sampled.append(tuple(c.logprobs for c in group))
            kept.append(sample)
            known.append(tuple(found))
    if not rows:
        return TrainingRows((Row(_NOTHING, (_NOTHING,)),), ((None,),), False, "none", ((0.0,),))
    return TrainingRows(tuple(rows), tuple(sampled), True, _names(kept), tuple(known))


def update(
    policy: Policy, reference: Reference | None, training: TrainingRows, cfg: ObjectiveConfig
) -> UpdateStats:
    """Make one optimizer step. `sums` of the result hold `units` and what the objective logs.

    Raises:
        NonFiniteError: before anything is updated, on every process.
    """
    batches = policy.micro_batches(training.rows)
    sampled = _sampled_targets(training, batches)
    referred = reference.score(batches) if reference is not None else []
    group_advantages = _advantage_targets(training, batches) if cfg.kind == "grpo" else []
    paired = cfg.kind in PAIRED
    assert not paired or reference is not None, "DPO needs a reference policy"

    def loss(log_probs: Tensor, rows: PackedRows, number: int) -> tuple[Tensor, int, dict[str, float]]:
        if not training.real:
            return 0.0 * log_probs.sum(), 0, {}
        logged = _drift(log_probs.detach(), sampled[number])
        if paired:
            found = _paired_loss(log_probs, rows, rows.sum_by_suffix(referred[number]), cfg)
        elif cfg.kind == "grpo":
            known = referred[number] if referred else None
            found = _group_loss(log_probs, sampled[number], group_advantages[number], known, cfg)
        else:
            found = -log_probs.sum(), len(log_probs), {}
        return found[0], found[1], {**logged, **found[2]}

    return policy.update(batches, loss, training.documents)


def _group_loss(
    log_probs: Tensor, sampled: Tensor, advantages: Tensor, referred: Tensor | None, cfg: ObjectiveConfig
) -> tuple[Tensor, int, dict[str, float]]:
    kl = None if referred is None else kl_to_reference(log_probs, referred)
    losses, clipped = grpo_losses(
        log_probs, sampled, advantages, clip=cfg.clip, kl=kl, kl_weight=cfg.kl_weight
    )
    logged = {"grpo_tokens": float(len(losses)), "clipped": clipped.double().sum().item()}
    if kl is not None:
        logged["kl"] = kl.detach().double().sum().item()
    return losses.sum(), len(losses), logged


def _paired_loss(
    log_probs: Tensor, rows: PackedRows, ref_sums: Tensor, cfg: ObjectiveConfig
) -> tuple[Tensor, int, dict[str, float]]:
    found = dpo(
        log_probs,
        rows.suffix_starts,
        ref_sums,
        beta=cfg.beta,
        length_normalised=cfg.length_normalised,
        nll_weight=cfg.nll_weight,
    )
    num_pairs = len(found.losses)
    diagnostics = dpo_diagnostics(found.policy, found.reference, cfg.beta)
    return found.losses.sum(), num_pairs, {"pairs": float(num_pairs), **diagnostics}


def _sampled_targets(training: TrainingRows, batches: Sequence[PackedRows]) -> list[Tensor]:
    """[num_targets] float32 a micro-batch: the sampler's log-prob of each target, NaN where not sampled."""
    flat = []
    for row, sampled in zip(training.rows, training.sampled, strict=True):
        for number, logprobs in zip(row.num_scored, sampled, strict=True):
            flat.append(np.full(number, np.nan) if logprobs is None else logprobs)
    return _by_batch(flat, batches)


def _advantage_targets(training: TrainingRows, batches: Sequence[PackedRows]) -> list[Tensor]:
    """[num_targets] float32 a micro-batch: the advantage of the suffix each target belongs to."""
    flat = []
    for row, values in zip(training.rows, training.advantages, strict=True):
        for number, value in zip(row.num_scored, values, strict=True):
            flat.append(np.full(number, value))
    return _by_batch(flat, batches)


def _by_batch(flat: Sequence[np.ndarray], batches: Sequence[PackedRows]) -> list[Tensor]:
    """Values of all targets in order, as one float32 tensor a micro-batch on its device."""
    values = torch.from_numpy(np.concatenate(flat).astype(np.float32))
    parts = values.split([len(b.targets) for b in batches])
    return [part.to(b.tokens.device) for part, b in zip(parts, batches, strict=True)]


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
