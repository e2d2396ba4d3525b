"""Read what runs recorded: settings, a curve for each metric, and a sample of the judged pools."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sip_engine.monitoring.records import METRICS, POOLS, read_records
from sip_engine.utils.errors import DataError

CONFIG = "config.json"
RECORDS = (METRICS, POOLS, CONFIG)
MAX_POINTS = 500
MAX_POOLS = 200
MAX_POOLS_OF_LAST_STEP = 32


@dataclass(frozen=True)
class Curve:
    """One metric over steps: `steps` and `values`, both float64 [n] with n > 0, steps rising."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def thinned(self, max_points: int = MAX_POINTS) -> Curve:
        """At most `max_points` points: means over equal bins of neighbours (the last may be smaller)."""
        size = math.ceil(len(self) / max_points)
        starts = np.arange(0, len(self), size)
        counts = np.diff(np.append(starts, len(self)))
        steps, values = (np.add.reduceat(a, starts) / counts for a in (self.steps, self.values))
        return Curve(steps, values)

    def ends(self) -> tuple[float, float]:
        """Mean over the first and over the last fifth of the points."""
        size = max(1, len(self) // 5)
        return float(self.values[:size].mean()), float(self.values[-size:].mean())


@dataclass(frozen=True)
class RunRecords:
    """What a run left behind; whatever it did not record is empty."""

    name: str
    config: dict[str, Any]
    curves: dict[str, Curve]
    pools: list[dict[str, Any]]
    """At most `MAX_POOLS` evenly over the run and `MAX_POOLS_OF_LAST_STEP` of its last step, in order."""
    num_pools: int
    """How many the run recorded."""
    modified: float
    """Time of the newest record, seconds since the epoch."""

    def setting(self, path: str, default: Any = None) -> Any:
        """The setting at a dotted path, such as `judge.backend`."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value


def load_runs(folders: Sequence[Path]) -> list[RunRecords]:
    """Load each folder once, named by the shortest end of its path that tells the runs apart.

    Raises:
        DataError: no folder is given, one holds no records, or a record is damaged.
    """
    paths = list(dict.fromkeys(folder.resolve() for folder in folders))
    if not paths:
        raise DataError("no runs to report: give at least one run folder")
    names = _short_names(paths)
    return [_load_run(folder, name) for folder, name in zip(paths, names, strict=True)]


def _short_names(paths: Sequence[Path]) -> list[str]:
    depth, names = 1, [path.name for path in paths]
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return names


def _load_run(folder: Path, name: str) -> RunRecords:
    found = [path for path in (folder / record for record in RECORDS) if path.is_file()]
    if not any(path.stat().st_size for path in found):
        raise DataError(f"{folder}: holds no records ({', '.join(RECORDS)}); give the folder of a run")
    pools, num_pools = _read_pools(folder / POOLS)
    return RunRecords(
        name=name,
        config=_read_config(folder / CONFIG),
        curves=_read_curves(folder / METRICS),
        pools=pools,
        num_pools=num_pools,
        modified=max(path.stat().st_mtime for path in found),
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from None
    if not isinstance(config, dict):
        raise _damaged(path, "not an object")
    return config


def _read_curves(path: Path) -> dict[str, Curve]:
    """Points by metric; rows may come in any order and share a step, what is not a finite number is left out."""
    points: dict[str, dict[int, float]] = {}
    try:
        for row in read_records(path):
            step = int(row.pop("step"))
            for name, value in row.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    points.setdefault(name, {})[step] = float(value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None
    return {name: _curve(values) for name, values in points.items()}


def _curve(points: dict[int, float]) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps, np.float64), np.array([points[step] for step in steps]))


def _read_pools(path: Path) -> tuple[list[dict[str, Any]], int]:
    """A sample of the pools and the number of all: lines are indexed in one pass, only the sample is parsed."""
    if not path.is_file():
        return [], 0
    with path.open("rb") as file:
        starts = list(_line_starts(file))
        if not starts:
            return [], 0
        try:
            last = _last_step(file, starts)
            sampled = {starts[n] for n in evenly(len(starts), MAX_POOLS)} - last.keys()
            pools = last | {start: _pool_at(file, start) for start in sampled}
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from None
    return [pools[start] for start in sorted(pools)], len(starts)


def evenly(num_items: int, num_wanted: int) -> list[int]:
    """At most `num_wanted` indices of `num_items`, evenly spread from the first to the last."""
    wanted = min(num_items, num_wanted)
    return np.linspace(0, num_items - 1, wanted).round().astype(int).tolist() if wanted else []


def _line_starts(file: BinaryIO) -> Iterator[int]:
    """Offsets of complete lines; one cut short by a crash is left out."""
    position = 0
    for line in file:
        if line.endswith(b"\n"):
            yield position
        position += len(line)


def _last_step(file: BinaryIO, starts: Sequence[int]) -> dict[int, dict[str, Any]]:
    newest = {start: _pool_at(file, start) for start in starts[-MAX_POOLS_OF_LAST_STEP:]}
    step = newest[starts[-1]]["step"]
    return {start: pool for start, pool in newest.items() if pool["step"] == step}


def _pool_at(file: BinaryIO, start: int) -> dict[str, Any]:
    file.seek(start)
    pool = _short_floats(json.loads(file.readline()))
    if not isinstance(pool["prefix"], str) or not all(isinstance(c, dict) for c in pool["candidates"]):
        raise ValueError("a pool needs a prefix and candidates")
    int(pool["step"])
    return pool


def _short_floats(value: Any) -> Any:
    """The same JSON value with floats rounded to 4 places; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, list):
        return [_short_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: _short_floats(item) for key, item in value.items()}
    return value


def _damaged(path: Path, why: object) -> DataError:
    return DataError(f"{path}: not the records of a run ({why}); remove the file or the damaged line")
