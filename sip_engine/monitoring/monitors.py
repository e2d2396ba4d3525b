"""Watches a run for the known ways in which it fails, while it runs, by the same rules that its report shows."""

from __future__ import annotations

from rich.markup import escape

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.monitoring.curves import RunState
from sip_engine.monitoring.records import Records
from sip_engine.monitoring.signatures import SEEN, all_signatures
from sip_engine.utils.errors import ThresholdError
from sip_engine.utils.progress import console


class Monitors:
    """Looks at what the run has in hand; says each failure signature once, or stops the run (method §signatures).

    All that it knows is in the run's records, which are taken back to the checkpoint on resume: a run that was
    interrupted is watched as one that was not.
    """

    def __init__(self, cfg: RunConfig, records: Records, mesh: Mesh) -> None:
        self._cfg, self._records, self._mesh = cfg.monitors, records, mesh
        self._settings = cfg.model_dump(mode="json")

    def check(self, step: int) -> dict[str, float]:
        """Look now, if it is time: `monitor/<name>` is 1 for a signature that is seen, 0 for one that is not.

        Raises:
            ThresholdError: on every process, if one is seen and the settings want the run to stop.
        """
        if not self._cfg.every or step % self._cfg.every:
            return {}
        found = self._mesh.broadcast(self._look() if self._mesh.is_main else None)
        seen = {name: evidence for name, (is_seen, evidence) in found.items() if is_seen}
        if seen and self._cfg.action == "stop":
            name, evidence = next(iter(seen.items()))
            raise ThresholdError(
                f"step {step}: {name} ({evidence}); the newest checkpoint is from before; see the report, change the "
                'run, or set monitors.action="warn"'
            )
        curves = self._records.curves
        for name in seen if self._mesh.is_main else ():
            if _metric(name) not in curves or not curves[_metric(name)].values.any():
                console.print(
                    f"[yellow]watch out:[/] {name}: {escape(seen[name])}", markup=True, soft_wrap=True
                )
        return {_metric(name): float(is_seen) for name, (is_seen, _) in found.items()}

    def _look(self) -> dict[str, tuple[bool, str]]:
        """Short name of each signature that the records can tell: whether it is seen, and on what evidence."""
        state = RunState("", self._settings, self._records.curves, tuple(self._records.latest_pools))
        return {
            s.name: (s.findings[0].verdict == SEEN, s.findings[0].evidence)
            for s in all_signatures([state])
            if s.findings
        }


def _metric(name: str) -> str:
    return f"monitor/{name.replace(' ', '_')}"
