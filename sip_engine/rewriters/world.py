"""Opens the synthetic world's own rewriter."""

from __future__ import annotations

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.data.sources import open_world
from sip_engine.distributed.mesh import Mesh
from sip_engine.world import WorldRewriter


def open_rewriter(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> WorldRewriter:
    """`rewriter.backend = "world"`."""
    del corpus, mesh
    world = open_world(cfg)
    assert world is not None, "the settings were checked"
    return WorldRewriter(world)
