"""The objectives: which candidates of a judged pool an update trains on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sip_engine.config.schema import JUDGED, ObjectiveConfig
from sip_engine.types import Candidate, Choice, Kind, Sample, Verdict


def choose(
    cfg: ObjectiveConfig, sample: Sample, candidates: Sequence[Candidate], verdict: Verdict | None, seed: int
) -> Choice | None:
    """The objective's pick from a pool, or None when the pool teaches nothing (a tie, too few verdicts).

    A lone candidate is RF-NLL's pick without a judge: a stage of originals only is plain pretraining.
    Equal rewards are broken by `seed`, never by the candidates' order, so that no kind is favoured.
    """
    pool = tuple(candidates)
    if cfg.kind == "rf_nll" and len(pool) == 1:
        return Choice(sample, pool, 0)
    if cfg.kind in JUDGED:
        assert verdict is not None
        return _by_reward(cfg, sample, pool, verdict.rewards, seed)
    first = {kind: n for n, kind in reversed(list(enumerate(c.kind for c in pool)))}
    if cfg.kind == "sft_rewrite":
        return Choice(sample, pool, first[Kind.REWRITE]) if Kind.REWRITE in first else None
    if cfg.kind == "sft_rollout":
        return Choice(sample, pool, first[Kind.ROLLOUT]) if Kind.ROLLOUT in first else None
    assert cfg.kind == "dpo_rewrite_over_rollout"
    if not {Kind.REWRITE, Kind.ROLLOUT} <= first.keys():
        return None
    return Choice(sample, pool, first[Kind.REWRITE], first[Kind.ROLLOUT])


def _by_reward(
    cfg: ObjectiveConfig,
    sample: Sample,
    pool: tuple[Candidate, ...],
    rewards: Sequence[float | None],
    seed: int,
) -> Choice | None:
    judged = [n for n, reward in enumerate(rewards) if reward is not None]
    if not judged:
        return None
    order = np.random.default_rng([seed, sample.document, sample.cut]).permutation(judged)
    best = max(order, key=lambda n: rewards[n])
    if cfg.kind == "rf_nll":
        return Choice(sample, pool, int(best))
    worst = min(order[::-1], key=lambda n: rewards[n])
    margin = rewards[best] - rewards[worst]  # type: ignore[operator]
    if best == worst or (margin == 0 and cfg.ties == "drop") or 0 < margin <= cfg.min_margin:
        return None
    return Choice(sample, pool, int(best), int(worst), margin)


@torch.no_grad()
def dpo_diagnostics(policy: Tensor, reference: Tensor, beta: float) -> dict[str, float]:
    """Sums over pairs [n, 2] (chosen, rejected) of what a run should watch.

    Chosen and rejected falling together is a known failure of DPO (method §failure signatures).
    """
    gain = policy - reference
    return {
        "chosen_logprob": policy[:, 0].sum().item(),
        "rejected_logprob": policy[:, 1].sum().item(),
        "chosen_gain": gain[:, 0].sum().item(),
        "rejected_gain": gain[:, 1].sum().item(),
        "implicit_margin": beta * (gain[:, 0] - gain[:, 1]).sum().item(),
        "implicit_accuracy": (gain[:, 0] > gain[:, 1]).double().sum().item(),
    }
