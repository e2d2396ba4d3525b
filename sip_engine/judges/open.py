"""From settings to the judge that a run's backend names."""

from __future__ import annotations

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus, open_world
from sip_engine.distributed.mesh import Mesh
from sip_engine.judges.distributed import ReplicaJudge, StagesJudge
from sip_engine.judges.heuristic.judge import HeuristicJudge
from sip_engine.judges.local import LocalJudge
from sip_engine.judges.server import ServerJudge
from sip_engine.llm.local_model import open_local_model
from sip_engine.types import Judge
from sip_engine.world import WorldJudge

_JUDGE_DOCUMENTS = 2000


def open_judge(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> Judge:
    """The judge of a run; all processes of a replica ask it together.

    Raises:
        ConfigError, CheckpointError, DataError: it cannot be had.
    """
    world = open_world(cfg)
    if cfg.judge.backend == "local":
        return StagesJudge(LocalJudge(open_local_model(cfg.judge.local, mesh, "judge")), mesh)
    if cfg.judge.backend == "server":
        return ReplicaJudge(ServerJudge(cfg.judge.server), mesh)
    if cfg.judge.backend == "world" and world is not None:
        return ReplicaJudge(WorldJudge(world), mesh)
    texts = corpus.texts(_JUDGE_DOCUMENTS, cfg.data.text_column)
    return ReplicaJudge(HeuristicJudge.from_texts(texts), mesh)
