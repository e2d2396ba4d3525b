"""Opens the synthetic world's ground truth as a judge; what it answers is in `world/judge.py`."""

from __future__ import annotations

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.data.sources import open_world
from sip_engine.distributed.mesh import Mesh
from sip_engine.world import WorldJudge


def open_judge(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> WorldJudge:
    """`judge.backend = "world"`."""
    del corpus, mesh
    world = open_world(cfg)
    assert world is not None, "the settings were checked"
    return WorldJudge(world)
