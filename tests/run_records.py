"""A run's records in memory, as `load_runs` reads them, and pools as a run writes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from sip_engine.monitoring.curves import Curve
from sip_engine.monitoring.load import RunRecords


def a_pool(texts: list[str] | None = None, *, prefix: str = "Once", **changes: Any) -> dict[str, Any]:
    """A judged pool with an original and rollouts, as a run records it."""
    texts = texts or [" upon a time.", " more", " again and again."]
    size = len(texts)
    candidates = [
        {"kind": "rollout" if n else "original", "text": text, "reward": n / size, "quality": n / size}
        for n, text in enumerate(texts)
    ]
    pairs = [[i, j, 0.0] for i in range(size) for j in range(i + 1, size)]
    entry = {"document": 7, "cut": 40, "prefix": prefix, "candidates": candidates, "pairs": pairs}
    return entry | {"failures": [], "chosen": size - 1, "rejected": 0} | changes


def records_of(**curves: Any) -> RunRecords:
    """A run in memory; `a__b` names the metric a/b, values are its curve at steps 1, 2, ..."""
    config, pools = curves.pop("config", {}), curves.pop("pools", [])
    named = {
        name.replace("__", "/"): Curve(np.arange(1.0, len(values) + 1), np.asarray(values, np.float64))
        for name, values in curves.items()
    }
    return RunRecords("run", config, named, pools, pools, len(pools), 0.0)
