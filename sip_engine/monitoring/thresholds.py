"""Limits beyond which a run's judge or sampler can no longer be trusted, and the run stops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sip_engine.config.schema import RunConfig
from sip_engine.types import Verdict
from sip_engine.utils.errors import ThresholdError


class Thresholds:
    """The limits of a run; `hear` keeps why the judge failed, to be said where it failed too often."""

    def __init__(self, cfg: RunConfig) -> None:
        self._judge, self._drift = cfg.judge.max_failure_rate, cfg.drift_limit
        self._failure = ""

    def hear(self, verdicts: Iterable[Verdict]) -> None:
        """Take note of a step's verdicts on this process."""
        self._failure = next((reason for verdict in verdicts for reason in verdict.failures), "")

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stop a run whose figures, equal on all processes, are beyond a limit.

        Raises:
            ThresholdError: on every process alike, naming the figure, its limit and the setting.
        """
        limits = (
            ("judge/failure_rate", self._judge, "judge.max_failure_rate", self._failure),
            ("drift/mean", self._drift, "max_drift", ""),
        )
        for name, limit, setting, cause in limits:
            if metrics.get(name, 0.0) > limit:
                reason = f" ({cause})" if cause else ""
                raise ThresholdError(
                    f"step {step}: {name} is {metrics[name]:.4g}, above {setting}={limit}{reason}; "
                    "the newest checkpoint, if there is one, is from before; find the cause or raise the limit"
                )
