"""Weights & Biases: one run there for a run here, over all its restarts."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from sip_engine.config.schema import RunConfig
from sip_engine.utils.files import write_atomic
from sip_engine.utils.regular import read_text

ID = "wandb_id.txt"


_UNSENT = {name: {"server", "options"} for name in ("judge", "rewriter", "corruptor")}
"""Tables that may hold keys."""


class Wandb:
    """Metrics by their names over `step`; the settings as the run's config, servers and free tables left out."""

    def __init__(self, cfg: RunConfig, from_step: int) -> None:
        import wandb

        path, section = cfg.out / ID, cfg.tracking.wandb
        known = read_text(path).strip() if path.is_file() and from_step else ""
        name = known or uuid.uuid4().hex[:12]
        write_atomic(path, name + "\n")
        # Its own files go under the run's folder; the console is left to us.
        self._run: Any = wandb.init(
            project=section.project,
            entity=section.entity or None,
            mode=section.mode,
            id=name,
            name=cfg.out.name,
            resume="allow",
            dir=str(cfg.out),
            config=cfg.model_dump(mode="json", exclude=_UNSENT),
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, init_timeout=60.0
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # Its own step may not go back, as ours does after a restart: ours is a metric of its own.
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def open_tracker(cfg: RunConfig, from_step: int) -> Wandb:
    return Wandb(cfg, from_step)
