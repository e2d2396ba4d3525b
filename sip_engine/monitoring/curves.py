"""A curve for each metric of a run, and what is known of a run besides, whether it is at work or long over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_POINTS = 500
LATEST_POOLS = 200
"""So many of a run's newest pools tell how its judge decides now."""


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


class Curves(Mapping[str, Curve]):
    """Points of every metric as they are logged; a curve is made when it is asked for."""

    def __init__(self) -> None:
        self._points: dict[str, dict[float, float]] = {}

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """One row of metrics. The last row of a step counts; what is not a finite number is left out."""
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._points.setdefault(name, {})[float(step)] = float(value)

    def __getitem__(self, name: str) -> Curve:
        points = self._points[name]
        steps, values = (np.fromiter(side, np.float64, len(points)) for side in (points, points.values()))
        order = np.argsort(steps, kind="stable")
        return Curve(steps[order], values[order])

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)


@dataclass(frozen=True)
class RunState:
    """What a run's signatures are read from; whatever it did not record is empty."""

    name: str
    config: Mapping[str, Any]
    curves: Mapping[str, Curve]
    latest_pools: Sequence[Mapping[str, Any]]
    """Its last `LATEST_POOLS` recorded pools, in order, as `short_floats` leaves them."""

    def setting(self, path: str, default: Any = None) -> Any:
        """The setting at a dotted path, such as `judge.backend`."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value


def short_floats(value: Any) -> Any:
    """The same JSON value with floats rounded to 4 places; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, list):
        return [short_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: short_floats(item) for key, item in value.items()}
    return value
