"""Who can judge, rewrite, corrupt and show a run, by names in a config; nothing is imported before it is used.

An opener is called as `opener(cfg, corpus, mesh)`, with the settings of the run, its documents and its processes,
once on each process. The engine's own are listed here. Another package adds one by a call,

    @register_judge("mine")
    def open_mine(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> Judge: ...

of `sip_engine.judges.open` (likewise `register_rewriter`, `register_corruptor` and `register_tracker` of
`rewriters.open`, `tasks.corruptors.open` and `monitoring.trackers.base`), or by an entry point of the groups named
below. Its own settings stand in the section's free table `options`.
"""

from __future__ import annotations

from typing import Any

from sip_engine.utils.registry import Registry

JUDGES: Registry[Any] = Registry(
    "judge",
    "sip_engine.judges",
    {
        "heuristic": "sip_engine.judges.heuristic.judge:open_judge",
        "world": "sip_engine.judges.world:open_judge",
        "server": "sip_engine.judges.server:open_judge",
        "local": "sip_engine.judges.local:open_judge",
    },
)
REWRITERS: Registry[Any] = Registry(
    "rewriter",
    "sip_engine.rewriters",
    {
        "none": "sip_engine.rewriters.open:open_nobody",
        "world": "sip_engine.rewriters.world:open_rewriter",
        "server": "sip_engine.rewriters.server:open_rewriter",
        "local": "sip_engine.rewriters.local:open_rewriter",
    },
)
TRACKERS: Registry[Any] = Registry(
    "tracker",
    "sip_engine.trackers",
    {
        "tensorboard": "sip_engine.monitoring.trackers.tensorboard:open_tracker",
        "wandb": "sip_engine.monitoring.trackers.wandb:open_tracker",
        "prometheus": "sip_engine.monitoring.trackers.prometheus:open_tracker",
    },
)
"""Opened as `opener(cfg, from_step)` on the first process: `monitoring.trackers.base.Tracker`."""
CORRUPTORS: Registry[Any] = Registry(
    "corruptor",
    "sip_engine.corruptors",
    {
        "rules": "sip_engine.tasks.corruptors.rules:open_corruptor",
        "edits": "sip_engine.tasks.corruptors.edits:open_corruptor",
        "world": "sip_engine.tasks.corruptors.world:open_corruptor",
        "server": "sip_engine.tasks.corruptors.server:open_corruptor",
    },
)
