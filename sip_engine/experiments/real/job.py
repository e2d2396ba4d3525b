"""A piece of work of `sip real` that is done once, whose result is a file."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.monitoring.supervision import supervised
from sip_engine.policy.checkpoint import latest_checkpoint, read_state
from sip_engine.train import train


@dataclass(frozen=True)
class Job:
    """Something to be trained, unless it is there, and measured; done when its result is there."""

    title: str
    share: float
    """Of all time, in units of all jobs: for the ETA."""
    result: Path
    do: Callable[[], None]


def train_once(cfg: RunConfig, mesh: Mesh) -> None:
    """Train to the end unless that is done; goes on from the newest checkpoint."""
    newest = latest_checkpoint(cfg.out / "checkpoints")
    if newest is not None and read_state(newest).step >= cfg.steps:
        return
    with supervised(cfg):
        train(cfg, mesh)
    gc.collect()
