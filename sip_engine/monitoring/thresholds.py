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

    def check_judge(self, step: int, means: Mapping[str, float]) -> None:
        """Stop a run whose judge fails too often; `means` are equal on all processes.

        Raises:
            ThresholdError: on every process alike, before the update, so that the run can be saved as it is.
        """
        self._check(step, "judge/failure_rate", means, self._judge, "judge.max_failure_rate")

    def check_drift(self, step: int, sums: Mapping[str, float]) -> None:
        """Stop a run whose sampler and trainer disagree by the sums of an update that is not yet made.

        Raises:
            ThresholdError: as `check_judge`.
        """
        if sums.get("drift_tokens"):
            means = {"drift/mean": sums["drift_sum"] / sums["drift_tokens"]}
            self._check(step, "drift/mean", means, self._drift, "max_drift")

    def _check(self, step: int, name: str, means: Mapping[str, float], limit: float, setting: str) -> None:
        value = means.get(name, 0.0)
        if value > limit:
            cause = f" ({self._failure})" if self._failure and setting.startswith("judge") else ""
            error = ThresholdError(
                f"step {step}: {name} is {value:.4g}, above {setting}={limit}{cause}; the step was not made; find "
                "the cause or raise the limit"
            )
            error.resumable = True
            raise error
