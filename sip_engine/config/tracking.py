"""Settings of what shows a run while it goes on, beside the records that every run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sip_engine.config.backends import TRACKERS
from sip_engine.config.section import Section


class WandbConfig(Section):
    """Weights & Biases; needs wandb."""

    project: str = "sip-engine"
    """Project that the run is shown in."""
    entity: str = ""
    """User or team; unset is the account's own."""
    mode: Literal["online", "offline"] = "online"
    """offline: files under the run's folder, for `wandb sync` to send later."""


class PrometheusConfig(Section):
    """A text file for a node exporter's textfile collector; needs prometheus-client."""

    path: Path | None = None
    """File that is replaced at every step, named `….prom`; unset: metrics.prom in the run's folder."""


class TrackingConfig(Section):
    """What shows a run's metrics beside metrics.jsonl. A tracker that fails is said once and gone on without."""

    use: tuple[Annotated[str, AfterValidator(TRACKERS.check)], ...] = ("tensorboard",)
    """tensorboard, wandb, prometheus, or the names of other packages' trackers."""
    wandb: WandbConfig = WandbConfig()
    prometheus: PrometheusConfig = PrometheusConfig()
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of other packages' trackers, a table for each."""
    timeline_every: Annotated[int, Field(ge=0)] = 1
    """Steps between records of what every process did when, in the folder timeline; 0 keeps none."""
