"""From settings to the rewriter that a run's backend names."""

from __future__ import annotations

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import open_world
from sip_engine.distributed.mesh import Mesh
from sip_engine.llm.local_model import open_local_model
from sip_engine.rewriters.distributed import ReplicaRewriter, StagesRewriter
from sip_engine.rewriters.local import LocalRewriter
from sip_engine.rewriters.server import ServerRewriter
from sip_engine.types import Rewriter
from sip_engine.world import WorldRewriter


def open_rewriter(cfg: RunConfig, mesh: Mesh) -> Rewriter | None:
    """The rewriter of a run, if it has one; all processes of a replica ask it together.

    Raises:
        ConfigError, CheckpointError, DataError: it cannot be had.
    """
    world = open_world(cfg)
    if cfg.rewriter.backend == "local":
        return StagesRewriter(LocalRewriter(open_local_model(cfg.rewriter.local, mesh, "rewriter")), mesh)
    if cfg.rewriter.backend == "server":
        return ReplicaRewriter(ServerRewriter(cfg.rewriter.server), mesh)
    if cfg.rewriter.backend == "world" and world is not None:
        return WorldRewriter(world)
    return None
