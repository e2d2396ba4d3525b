"""Watches a run for the known ways in which it fails, while it runs, by the same rules that its report shows."""

from __future__ import annotations

from pathlib import Path

from sip_engine.config.schema import MonitorConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.monitoring.curves import load_runs
from sip_engine.monitoring.signatures import SEEN, all_signatures
from sip_engine.utils.errors import ThresholdError
from sip_engine.utils.progress import console


class Monitors:
    """Looks at what the run has recorded; says each failure signature once, or stops the run (method §signatures)."""

    def __init__(self, folder: Path, cfg: MonitorConfig, mesh: Mesh) -> None:
        self._folder, self._cfg, self._mesh = folder, cfg, mesh
        self._said: set[str] = set()

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
        for name in seen.keys() - self._said if self._mesh.is_main else ():
            console.print(f"[yellow]watch out:[/] {name}: {seen[name]}", soft_wrap=True)
        self._said |= seen.keys()
        return {f"monitor/{name.replace(' ', '_')}": float(is_seen) for name, (is_seen, _) in found.items()}

    def _look(self) -> dict[str, tuple[bool, str]]:
        """Short name of each signature that the records can tell: whether it is seen, and on what evidence."""
        signatures = all_signatures(load_runs([self._folder]))
        return {
            s.name: (s.findings[0].verdict == SEEN, s.findings[0].evidence) for s in signatures if s.findings
        }
