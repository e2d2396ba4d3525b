"""From settings to the corruptor that a config's backend names."""

from __future__ import annotations

from sip_engine.config.backends import CORRUPTORS
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.tasks.corruptors.base import Corruptor

register_corruptor = CORRUPTORS.register
"""`@register_corruptor("mine")` on an opener makes `corruptor.backend = "mine"` a corruptor of any config."""


def open_corruptor(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> Corruptor:
    """The corruptor that `corruptor.backend` names, made by its opener: `opener(cfg, corpus, mesh)`.

    Raises:
        ConfigError, DataError: it cannot be had.
    """
    return CORRUPTORS.get(cfg.corruptor.backend)(cfg, corpus, mesh)
