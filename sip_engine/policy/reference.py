"""The reference policy that DPO measures the policy against: frozen, refreshed, or a moving average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.packing import PackedRows
from sip_engine.policy.policy import Policy, score


class Reference:
    """A copy of the policy's weights, sharded like it, that no gradient updates.

    Offloaded, the weights live in CPU memory (pinned beside CUDA) and are on the device only while they score.
    A moving average is kept in float32, since a bf16 one would not move; checkpoints hold it so.
    """

    def __init__(self, cfg: RunConfig, vocab_size: int, mesh: Mesh) -> None:
        self.cfg = cfg.reference
        self.model: PolicyModel = build_model(cfg.model, cfg.parallel, vocab_size, mesh, seed=cfg.seed)
        self.model.requires_grad_(False)
        self._device = mesh.device
        self._average: list[Tensor] | None = None
        if self.cfg.offload:
            self._move(torch.device("cpu"))

    @torch.no_grad()
    def copy_from(self, policy: Policy) -> None:
        """Take the policy's weights of this moment."""
        for ours, theirs in zip(self.model.parameters(), policy.model.parameters(), strict=True):
            ours.copy_(theirs)
        self._average = None

    @torch.no_grad()
    def follow(self, policy: Policy, step: int) -> None:
        """Do what the settings want after update number `step`."""
        if self.cfg.refresh_every and step % self.cfg.refresh_every == 0:
            self.copy_from(policy)
        if self.cfg.ema:
            if self._average is None:
                self._average = self._start_average()
            parameters = zip(self._average, self.model.parameters(), policy.model.parameters(), strict=True)
            for average, ours, theirs in parameters:
                average.lerp_(theirs.to(average.device, torch.float32), 1.0 - self.cfg.ema)
                ours.copy_(average)

    @property
    def average(self) -> dict[str, Tensor] | None:
        """The moving average in float32, by the names of the model's parameters; None where there is none yet."""
        if self._average is None:
            return None
        return dict(zip((name for name, _ in self.model.named_parameters()), self._average, strict=True))

    def start_average(self) -> None:
        """Begin a moving average with the weights of this moment, to be filled by a checkpoint's."""
        self._average = self._start_average()

    def _start_average(self) -> list[Tensor]:
        return [p.detach().float().clone() for p in self.model.parameters()]

    def score(self, batches: Sequence[PackedRows]) -> list[Tensor]:
        """Log-probs [num_targets] of each micro-batch; empty before the last pipeline stage."""
        with self._on_device():
            return score(self.model, batches)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if not self.cfg.offload:
            yield
            return
        stored = [p.data for p in self.model.parameters()]
        try:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(self._device, non_blocking=True)
            yield
        finally:
            for parameter, data in zip(self.model.parameters(), stored, strict=True):
                parameter.data = data
            for module in self.model.modules():  # Transformer Engine's FP8 copies of weights stay otherwise
                getattr(module, "_fp8_workspaces", {}).clear()

    def _move(self, device: torch.device) -> None:
        pin = torch.cuda.is_available()
        for parameter in self.model.parameters():
            data = parameter.data.to(device)
            parameter.data = data.pin_memory() if pin else data
