"""From settings to the rewriter that a run's backend names."""

from __future__ import annotations

from sip_engine.config.backends import REWRITERS
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.rewriters.distributed import ReplicaRewriter, StagesRewriter
from sip_engine.types import Rewriter

register_rewriter = REWRITERS.register
"""`@register_rewriter("mine")` on an opener makes `rewriter.backend = "mine"` a rewriter of any config."""


def open_rewriter(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> Rewriter | None:
    """The rewriter of a run, if it has one; all processes of a replica ask it together.

    The opener that `rewriter.backend` names is called as `opener(cfg, corpus, mesh)` on every process. The first
    process of a replica asks what it returns, and all get the rewrites; unless that is a `StagesRewriter`.

    Raises:
        ConfigError, CheckpointError, DataError: it cannot be had.
    """
    rewriter: Rewriter | None = REWRITERS.get(cfg.rewriter.backend)(cfg, corpus, mesh)
    if rewriter is None or isinstance(rewriter, StagesRewriter):
        return rewriter
    return ReplicaRewriter(rewriter, mesh)


def open_nobody(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> None:
    """`rewriter.backend = "none"`."""
    del cfg, corpus, mesh
