"""The frozen reference policy that DPO measures the policy against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sip_engine.config import RunConfig
from sip_engine.mesh import Mesh
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.packing import PackedRows
from sip_engine.policy.policy import Policy, score


class Reference:
    """A copy of the policy's weights, sharded like it, that nothing updates."""

    def __init__(self, cfg: RunConfig, vocab_size: int, mesh: Mesh) -> None:
        self.model: PolicyModel = build_model(cfg.model, cfg.parallel, vocab_size, mesh, seed=cfg.seed)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def copy_from(self, policy: Policy) -> None:
        """Take the policy's weights of this moment."""
        for ours, theirs in zip(self.model.parameters(), policy.model.parameters(), strict=True):
            ours.copy_(theirs)

    def score(self, batches: Sequence[PackedRows]) -> list[Tensor]:
        """Log-probs [num_targets] of each micro-batch; empty before the last pipeline stage."""
        return score(self.model, batches)
