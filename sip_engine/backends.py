"""From settings to parts: the judge, the rewriter and the truth that a run's backends name."""

from __future__ import annotations

from sip_engine.checkpoint import resolve_checkpoint
from sip_engine.config import LocalModelConfig, RunConfig
from sip_engine.corpus import Corpus, open_world
from sip_engine.evaluate import Measure
from sip_engine.evaluation.frozen import FrozenPolicy
from sip_engine.judges.heuristic import HeuristicJudge
from sip_engine.judges.local import LocalJudge, LocalModel, LocalRewriter
from sip_engine.judges.server import ServerJudge
from sip_engine.mesh import Mesh
from sip_engine.progress import console
from sip_engine.replica import ReplicaJudge, ReplicaRewriter, StagesJudge, StagesRewriter
from sip_engine.rewriters.server import ServerRewriter
from sip_engine.types import Judge, Rewriter
from sip_engine.world import WorldJudge, WorldRewriter, measure

_JUDGE_DOCUMENTS = 2000


def open_judge(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> Judge:
    """The judge of a run; all processes of a replica ask it together.

    Raises:
        ConfigError, CheckpointError, DataError: it cannot be had.
    """
    world = open_world(cfg)
    if cfg.judge.backend == "local":
        return StagesJudge(LocalJudge(_local_model(cfg.judge.local, mesh, "judge")), mesh)
    if cfg.judge.backend == "server":
        return ReplicaJudge(ServerJudge(cfg.judge.server), mesh)
    if cfg.judge.backend == "world" and world is not None:
        return ReplicaJudge(WorldJudge(world), mesh)
    texts = corpus.texts(_JUDGE_DOCUMENTS, cfg.data.text_column)
    return ReplicaJudge(HeuristicJudge.from_texts(texts), mesh)


def open_rewriter(cfg: RunConfig, mesh: Mesh) -> Rewriter | None:
    """The rewriter of a run, if it has one; all processes of a replica ask it together.

    Raises:
        ConfigError, CheckpointError, DataError: it cannot be had.
    """
    world = open_world(cfg)
    if cfg.rewriter.backend == "local":
        return StagesRewriter(LocalRewriter(_local_model(cfg.rewriter.local, mesh, "rewriter")), mesh)
    if cfg.rewriter.backend == "server":
        return ReplicaRewriter(ServerRewriter(cfg.rewriter.server), mesh)
    if cfg.rewriter.backend == "world" and world is not None:
        return WorldRewriter(world)
    return None


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
        }

    return world_measure


def _local_model(cfg: LocalModelConfig, mesh: Mesh, role: str) -> LocalModel:
    """A model that every pipeline stage of the policy holds whole."""
    assert cfg.checkpoint is not None, "the settings were checked"
    policy, state = FrozenPolicy.load(resolve_checkpoint(cfg.checkpoint), mesh.without_pipeline())
    trained_as = state.run.get("config", {}).get("task", role)  # of an imported model nobody knows
    if trained_as != role and cfg.style == "compact" and mesh.is_main:
        console.print(
            f'{cfg.checkpoint} was trained with task = "{trained_as}", not as a {role}: what it says means little',
            soft_wrap=True,
        )
    return LocalModel(policy, cfg)
