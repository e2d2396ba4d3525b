"""What a process spends: peak memory, and energy where the machine reports it."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_RAPL = Path("/sys/class/powercap")


_highest = 0
"""Bytes: the peak of CUDA's allocator before it was last counted anew."""


def peak_since_last() -> int:
    """Bytes that CUDA's allocator has held at most since the last call."""
    global _highest
    peak = torch.cuda.max_memory_allocated()
    _highest = max(_highest, peak)
    torch.cuda.reset_peak_memory_stats()
    return peak


def peak_memory_mb() -> float:
    """Most memory this process has held so far, MiB: the GPU's allocator on CUDA, else resident memory."""
    if torch.cuda.is_available():
        return max(_highest, torch.cuda.max_memory_allocated()) / 2**20
    try:  # getrusage begins with the parent's peak
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


class EnergyMeter:
    """Joules since its making: the GPU's counter (NVML), else the processor packages' (RAPL).

    Both count all that the device does, whoever asked for it.
    """

    def __init__(self, rapl: Path = _RAPL) -> None:
        self._packages = [
            (zone / "energy_uj", zone / "max_energy_range_uj")
            for zone in sorted(rapl.glob("intel-rapl:?"))
            if _name(zone).startswith("package")  # others are parts of these, or hold them
        ]
        self._started = self._read()

    def joules(self) -> float | None:
        """None where the machine does not say."""
        now = self._read()
        if self._started is None or now is None or len(now) != len(self._started):
            return None
        spent = 0.0
        for before, (after, largest) in zip(self._started, now, strict=True):
            spent += after - before[0] if after >= before[0] else after - before[0] + largest
        return spent

    def _read(self) -> list[tuple[float, float]] | None:
        """Joules on each counter, and at which number it begins anew."""
        if torch.cuda.is_available():
            millijoules = _nvml_millijoules()
            return None if millijoules is None else [(millijoules / 1e3, 0.0)]
        try:
            found = [
                (int(now.read_text()) / 1e6, int(most.read_text()) / 1e6) for now, most in self._packages
            ]
        except (OSError, ValueError):  # readable by root only on many machines
            return None
        return found or None


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text()
    except OSError:
        return ""


def _nvml_millijoules() -> float | None:
    try:
        import pynvml  # pyright: ignore[reportMissingModuleSource, reportMissingImports]

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}".encode())
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(device))
    except Exception:  # no NVML, or a device without a counter
        return None
