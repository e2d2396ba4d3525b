"""Opens the synthetic world's own corruptor."""

from __future__ import annotations

from collections.abc import Sequence

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.data.sources import open_world
from sip_engine.distributed.mesh import Mesh
from sip_engine.tasks.corruptors.base import Corruption
from sip_engine.types import Failure, RewriteRequest
from sip_engine.world import World, corrupt


class WorldCorruptor:
    """By the synthetic world's rules: myths, insults, stutters, shuffles, repetitions, digressions."""

    name = "world"

    def __init__(self, world: World) -> None:
        self.world = world

    def corrupt(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[Corruption | Failure]:
        return [Corruption(*corrupt(self.world, r.prefix, r.suffix, seed)) for r in requests]


def open_corruptor(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> WorldCorruptor:
    """`corruptor.backend = "world"`."""
    del corpus, mesh
    world = open_world(cfg)
    assert world is not None, "the settings were checked"
    return WorldCorruptor(world)
