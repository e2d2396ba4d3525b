"""Steps that teach nothing: said when the first one comes, and how many there were when the run ends."""

from __future__ import annotations

from sip_engine.config.objective import LearnsFrom
from sip_engine.distributed.mesh import Mesh
from sip_engine.monitoring.records import Records
from sip_engine.utils.progress import console

EMPTY = "update/empty"
"""Metric, 1, of a step whose update was left out since there was nothing to learn from."""
_WHY = {
    LearnsFrom.POOLS: "no prefix offers two candidates of different text and reward (pairs/dropped; "
    "judge/failure_rate is the share of failed judgments)",
    LearnsFrom.GENERATIONS: "no prompt has two generations of different reward (groups/dropped; accuracy in the "
    "evaluations says whether all are right or all wrong)",
}
_METRICS = {LearnsFrom.POOLS: "pairs/dropped", LearnsFrom.GENERATIONS: "groups/dropped"}


class EmptySteps:
    """Counts them in the run's records, so that a resumed run goes on counting."""

    def __init__(self, records: Records, mesh: Mesh, learns_from: LearnsFrom) -> None:
        self._records, self._mesh, self._learns_from = records, mesh, learns_from

    def metrics(self, step: int, units: int) -> dict[str, float]:
        """What to record of update number `step`, which had `units` to learn from over all processes."""
        if units:
            return {}
        if self._mesh.is_main and EMPTY not in self._records.curves:
            console.print(
                f"[yellow]step {step} teaches nothing:[/] "
                f"{_WHY.get(self._learns_from, 'its batch holds nothing to learn from')}",
                markup=True,
                soft_wrap=True,
            )
        return {EMPTY: 1.0}

    def conclude(self, steps: int) -> None:
        """Say how many of a run's `steps` taught nothing, if any did."""
        if not self._mesh.is_main or EMPTY not in self._records.curves:
            return
        empty = len(self._records.curves[EMPTY].values)
        seen = _METRICS.get(self._learns_from, EMPTY)
        what = "the policy is as it began" if empty >= steps else f"see {seen} in the report"
        console.print(
            f"[yellow]{empty} of {steps} steps taught nothing:[/] {what}", markup=True, soft_wrap=True
        )
