"""One step as it is measured on this process, and the figures that all processes' measurements come to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.monitoring.meters import EnergyMeter
from sip_engine.monitoring.metrics import Clock, Means
from sip_engine.monitoring.step_memory import PARTS, held_bytes, memory_metrics, peak_bytes
from sip_engine.monitoring.throughput import StepWork, speeds
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.sampler.sampler import Sampler

_UNKNOWN = -1.0


@dataclass
class Step:
    """Seconds by phase, means over samples, and the work that was done, of one step on this process."""

    work: StepWork
    clock: Clock = field(default_factory=Clock)
    means: Means = field(default_factory=Means)
    _kv: int = 0
    _began: float = field(default_factory=time.perf_counter)
    _meter: EnergyMeter | None = field(
        default_factory=lambda: EnergyMeter() if torch.cuda.is_available() else None
    )

    def give_back(self, sampler: Sampler | None) -> None:
        """Have the sampler give its pages back before the update, where it does."""
        if sampler is not None:
            self._kv = sampler.kv_bytes_held
            sampler.give_back()

    def figures(
        self, cfg: RunConfig, mesh: Mesh, policy: Policy, reference: Reference | None, sampler: Sampler | None
    ) -> dict[str, float]:
        """`machine/...` and the judge's totals, when the step is done. A collective of the world.

        Memory is that of the fullest process; joules are those of all GPUs by NVML, missing where one has no counter.
        """
        seconds = time.perf_counter() - self._began
        joules = None if self._meter is None else self._meter.joules()
        parts = {**held_bytes(policy, reference, sampler), "kv": self._kv}
        mine = [_UNKNOWN if joules is None else joules, peak_bytes(), *(parts[name] for name in PARTS)]
        rows = mesh.table([*self.work.totals(), *mine])
        size = len(rows[0]) - len(mine)
        # All processes of a replica have counted the same.
        totals = [
            sum(column) / mesh.replica.size for column in zip(*(row[:size] for row in rows), strict=True)
        ]
        device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
        found = speeds(totals, seconds, mesh.size, device, cfg.judge)
        spent = [row[size] for row in rows]
        if _UNKNOWN not in spent:
            found["machine/joules"] = sum(spent)
        fullest = max((row[size + 1 :] for row in rows), key=lambda row: row[0])
        sizes: dict[str, float] = dict(zip(PARTS, fullest[1:], strict=True))
        return found | memory_metrics(fullest[0], sizes, kv_stays=sampler is None or not sampler.gives_back)
