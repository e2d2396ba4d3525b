"""Steps that teach nothing: said when the first one comes, and how many there were when the run ends."""

from __future__ import annotations

from sip_engine.distributed.mesh import Mesh
from sip_engine.monitoring.records import Records
from sip_engine.utils.progress import console

EMPTY = "update/empty"
"""Metric, 1, of a step whose update was left out since there was nothing to learn from."""


class EmptySteps:
    """Counts them in the run's records, so that a resumed run goes on counting."""

    def __init__(self, records: Records, mesh: Mesh) -> None:
        self._records, self._mesh = records, mesh

    def metrics(self, step: int, units: int) -> dict[str, float]:
        """What to record of update number `step`, which had `units` to learn from over all processes."""
        if units:
            return {}
        if self._mesh.is_main and EMPTY not in self._records.curves:
            console.print(
                f"[yellow]step {step} teaches nothing:[/] no prefix offers two candidates of different text and "
                "reward (pairs/dropped, groups/dropped; judge/failure_rate is the share of failed judgments)",
                markup=True,
                soft_wrap=True,
            )
        return {EMPTY: 1.0}

    def conclude(self, steps: int) -> None:
        """Say how many of a run's `steps` taught nothing, if any did."""
        if not self._mesh.is_main or EMPTY not in self._records.curves:
            return
        empty = len(self._records.curves[EMPTY].values)
        what = "the policy is as it began" if empty >= steps else "see pairs/dropped in the report"
        console.print(
            f"[yellow]{empty} of {steps} steps taught nothing:[/] {what}", markup=True, soft_wrap=True
        )
