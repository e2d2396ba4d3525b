"""Group-relative policy optimisation: generations of a prompt, graded, become advantages and a clipped loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sip_engine.config.objective import LearnsFrom, ObjectiveConfig
from sip_engine.config.schema import RunConfig
from sip_engine.objectives.base import Objective
from sip_engine.policy.rows import LossSums, Row
from sip_engine.types import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from sip_engine.policy.packing import PackedRows
    from sip_engine.sampler.requests import Completion

EPSILON = 1e-6
"""Added to a group's standard deviation, so that equal rewards give no advantage."""


class GRPO(Objective):
    """The clipped loss on every token of every generation, weighted by its advantage (method §judge training)."""

    learns_from = LearnsFrom.GENERATIONS

    def __init__(self, cfg: ObjectiveConfig) -> None:
        super().__init__(cfg)
        self.needs_reference = cfg.kl_weight > 0

    def check(self, cfg: RunConfig) -> None:
        if cfg.task == "policy":
            raise ValueError('objective.kind="grpo" trains on graded prompts: set task="judge" or "rewriter"')

    def row_of_group(
        self, sample: Sample, group: Sequence[Completion], rewards: Sequence[float | None]
    ) -> Row | None:
        found = advantages(rewards)
        if found is None:
            return None
        return Row(
            sample.prefix_ids,
            tuple(c.ids for c in group),
            sampled=tuple(c.logprobs for c in group),
            advantages=tuple(found),
            document=sample.document,
        )

    def loss(self, log_probs: Tensor, rows: PackedRows, reference: Tensor | None) -> LossSums:
        assert rows.sampled is not None and rows.advantages is not None
        kl = None if reference is None else kl_to_reference(log_probs, reference)
        losses, clipped = grpo_losses(
            log_probs,
            rows.sampled,
            rows.advantages,
            clip=self.cfg.clip,
            kl=kl,
            kl_weight=self.cfg.kl_weight,
        )
        logged: dict[str, float | Tensor] = {"grpo_tokens": float(len(losses)), "clipped": clipped.sum()}
        if kl is not None:
            logged["kl"] = kl.detach().double().sum()
        return LossSums(losses.sum(), len(losses), logged)

    def metrics(self, logged: Mapping[str, float]) -> dict[str, float]:
        tokens = max(logged.get("grpo_tokens", 0.0), 1.0)
        return {f"grpo/{name}": logged[name] / tokens for name in ("clipped", "kl") if name in logged}


def advantages(rewards: Sequence[float | None]) -> list[float] | None:
    """Each reward's distance from its group's mean, in standard deviations (arXiv 2402.03300, section 4.1.2).

    A generation without a reward (None) has advantage 0 and does not enter mean or deviation. None if the group
    teaches nothing: fewer than two rewards, or all equal.
    """
    import torch

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
    losses = -plain.minimum(clamped)
    if kl is not None:
        losses = losses + kl_weight * kl
    return losses, (clamped < plain).detach()


def kl_to_reference(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy | reference) of each sampled token (arXiv 2402.03300, eq. 4)."""
    gap = reference - log_probs
    return gap.exp() - gap - 1.0
