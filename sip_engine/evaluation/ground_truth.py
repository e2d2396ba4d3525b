"""The ground truth of a run: what its synthetic world knows of a suffix, whoever judges."""

from __future__ import annotations

from sip_engine.config.schema import RunConfig
from sip_engine.data.sources import open_world
from sip_engine.evaluation.held_out import FAULTLESS, Measure
from sip_engine.world import measure


def open_measure(cfg: RunConfig) -> Measure | None:
    """What the synthetic world knows of a suffix, whoever judges; None outside of it."""
    world = open_world(cfg)
    if world is None:
        return None

    def world_measure(prefix: str, suffix: str) -> dict[str, float]:
        found = measure(world, prefix, suffix)
        return {
            "coherence": found.coherence,
            "true_claims": found.factuality,
            "measured_quality": found.quality,
            FAULTLESS: float(found.is_faultless),
        }

    return world_measure
