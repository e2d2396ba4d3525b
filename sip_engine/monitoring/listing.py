"""The runs below a folder, each with its state, step and newest figures: what `sip runs` shows."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sip_engine.monitoring.load import CONFIG, RECORDS, newest_values
from sip_engine.monitoring.records import METRICS
from sip_engine.monitoring.sessions import SESSIONS, read_sessions, state_of
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import read_json

_SHOWN = (
    "loss",
    "reward/rollout",
    "reward",
    "eval/win_rate",
    "eval/heldout_loss",
    "machine/tokens_per_second",
)
_DEPTH = 6


@dataclass(frozen=True)
class Listed:
    """One run."""

    name: str
    """Its folder, below the one that was looked in."""
    state: str
    step: int
    steps: int | None
    """To be made; None where that is not known."""
    starts: int
    newest: float | None
    """Time of its newest record, seconds since the epoch."""
    elapsed: float | None
    """Seconds at work, over all its starts."""
    figures: dict[str, float] = field(default_factory=dict)
    """Newest value of each metric."""


def list_runs(folder: Path) -> list[Listed]:
    """Those in `folder` and below, the newest first; damaged ones are listed with what is wrong with them.

    Raises:
        DataError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one that holds runs")
    found = [_list_run(path, folder) for path in _run_folders(folder)]
    if not found:
        raise DataError(f"{folder}: holds no runs, down to {_DEPTH} folders deep; give the folder of runs")
    return sorted(found, key=lambda run: -(run.newest or 0.0))


def table_of(runs: Sequence[Listed]) -> Table:
    """As a table for a terminal."""
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "step", "newest record", "at work", "figures"):
        table.add_column(name, overflow="fold")
    for run in runs:
        figures = "  ".join(f"{n} {run.figures[n]:.4g}" for n in _SHOWN if n in run.figures)
        steps = f"{run.step:,}" if run.steps is None else f"{run.step:,} of {run.steps:,}"
        newest = "–" if run.newest is None else f"{in_words(time.time() - run.newest)} ago"
        elapsed = "–" if run.elapsed is None else in_words(run.elapsed)
        table.add_row(*(Text(cell) for cell in (run.name, run.state, steps, newest, elapsed, figures)))
    return table


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, inner, files in os.walk(folder):
        here = Path(path)
        if _is_run(here, files):
            inner.clear()
            yield here
            continue
        deep = len(here.relative_to(folder).parts) >= _DEPTH
        inner[:] = [] if deep else sorted(name for name in inner if not name.startswith("."))


def _is_run(folder: Path, files: Sequence[str]) -> bool:
    """A folder with records, or one that a run has locked and not yet recorded in; a config.json may be a model's."""
    return METRICS in files or SESSIONS in files or (CONFIG in files and (folder / ".lock").exists())


def _list_run(path: Path, root: Path) -> Listed:
    name = str(path.relative_to(root)) if path != root else path.name or str(path)
    records = [path / record for record in (*RECORDS, SESSIONS) if (path / record).is_file()]
    newest = max((record.stat().st_mtime for record in records), default=None)
    try:
        config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
        step, figures = newest_values(path / METRICS)
        sessions = read_sessions(path)
    except DataError as error:
        return Listed(name, f"damaged: {error}", 0, None, 0, newest, None)
    steps: Any = config.get("steps") if isinstance(config, dict) else None
    steps = steps if isinstance(steps, int) else None
    state = state_of(path, sessions, step, steps)
    elapsed = figures.get("elapsed")
    figures = {n: v for n, v in figures.items() if math.isfinite(v)}
    return Listed(name, state, step, steps, len(sessions), newest, elapsed, figures)


def in_words(seconds: float) -> str:
    """The two largest units of a time."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
