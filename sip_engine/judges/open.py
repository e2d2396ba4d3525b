"""From settings to the judge that a run's backend names."""

from __future__ import annotations

from sip_engine.config.backends import JUDGES
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.judges.distributed import ReplicaJudge, StagesJudge
from sip_engine.types import Judge

register_judge = JUDGES.register
"""`@register_judge("mine")` on an opener makes `judge.backend = "mine"` a judge of any config."""


def open_judge(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> Judge:
    """The judge of a run; all processes of a replica ask it together.

    The opener that `judge.backend` names is called as `opener(cfg, corpus, mesh)` on every process. The first process
    of a replica asks what it returns, and all get the answers; unless that is a `StagesJudge`, which they share.

    Raises:
        ConfigError, CheckpointError, DataError: it cannot be had.
    """
    judge: Judge = JUDGES.get(cfg.judge.backend)(cfg, corpus, mesh)
    return judge if isinstance(judge, StagesJudge) else ReplicaJudge(judge, mesh)
