"""Group-relative policy optimisation: generations of a prompt, graded, become advantages and a clipped loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to a group's standard deviation, so that equal rewards give no advantage."""


def advantages(rewards: Sequence[float | None]) -> list[float] | None:
    """Each reward's distance from its group's mean, in standard deviations (arXiv 2402.03300, section 4.1.2).

    A generation without a reward (None) has advantage 0 and does not enter mean or deviation. None if the group
    teaches nothing: fewer than two rewards, or all equal.
    """
    known = torch.tensor([r for r in rewards if r is not None], dtype=torch.float64)
    if len(known) < 2 or bool((known == known[0]).all()):
        return None
    mean, deviation = known.mean().item(), known.std(correction=0).item()
    return [0.0 if r is None else (r - mean) / (deviation + EPSILON) for r in rewards]


def grpo_losses(
    log_probs: Tensor,
    sampled: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    kl: Tensor | None,
    kl_weight: float,
) -> tuple[Tensor, Tensor]:
    """Loss of each token [n], and whether its ratio was clipped [n] bool (arXiv 2402.03300, eq. 3, per token).

        ratio = exp(log_prob - sampled)
        loss  = -min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A) + kl_weight * kl

    log_probs, sampled: [n] nats, the policy's now (differentiable) and when it sampled; advantages: [n].
    kl: [n] from `kl_to_reference`, or None.
    """
    ratio = (log_probs - sampled).exp()
    kept = ratio.clamp(1 - clip, 1 + clip)
    plain, clamped = ratio * advantages, kept * advantages
    losses = -torch.minimum(plain, clamped)
    if kl is not None:
        losses = losses + kl_weight * kl
    return losses, (clamped < plain).detach()


def kl_to_reference(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy | reference) of each sampled token (arXiv 2402.03300, eq. 4)."""
    gap = reference - log_probs
    return gap.exp() - gap - 1.0
