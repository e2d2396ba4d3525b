"""Prometheus: the newest metrics as a text file that a node exporter's textfile collector reads."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sip_engine.config.schema import RunConfig


class PrometheusFile:
    """A gauge `sip_NAME{run="..."}` for each metric, other signs than letters and digits as `_`; replaced whole."""

    def __init__(self, cfg: RunConfig) -> None:
        from prometheus_client import CollectorRegistry, Gauge

        self._path = cfg.tracking.prometheus.path or cfg.out / "metrics.prom"
        self._run = str(cfg.out)
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._make = Gauge

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from prometheus_client import write_to_textfile

        for name, value in {"step": float(step), **values}.items():
            key = "sip_" + re.sub(r"\W", "_", name, flags=re.ASCII)
            if key not in self._gauges:
                self._gauges[key] = self._make(key, f"{name} of a run", ["run"], registry=self._registry)
            self._gauges[key].labels(self._run).set(value)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(str(self._path), self._registry)

    def close(self) -> None:
        """The file stays: the last figures are those of the run's end."""


def open_tracker(cfg: RunConfig, from_step: int) -> PrometheusFile:
    del from_step
    return PrometheusFile(cfg)
