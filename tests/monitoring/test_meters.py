"""What a process spends: counters of energy are read, wrap around and may be missing; memory peaks are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sip_engine.monitoring.meters import EnergyMeter, peak_memory_mb


def counters(folder: Path, values: list[int], largest: int = 10_000_000) -> None:
    for number, value in enumerate(values):
        zone = folder / f"intel-rapl:{number}"
        zone.mkdir(exist_ok=True)
        (zone / "energy_uj").write_text(f"{value}\n")
        (zone / "max_energy_range_uj").write_text(f"{largest}\n")
        (zone / "name").write_text("psys\n" if number == 2 else f"package-{number}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own counter is read there")
def test_joules_of_all_packages_over_a_wrap(tmp_path: Path) -> None:
    counters(tmp_path, [1_000_000, 9_500_000, 7])  # the third holds the others
    meter = EnergyMeter(tmp_path)
    assert meter.joules() == 0.0
    counters(tmp_path, [3_500_000, 500_000, 5_000_000])
    assert meter.joules() == pytest.approx(2.5 + 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own counter is read there")
def test_a_machine_that_does_not_say(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).joules() is None
    counters(tmp_path, [5])
    meter = EnergyMeter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("")
    assert meter.joules() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's allocator is asked there")
def test_peak_memory_outlives_what_took_it() -> None:
    before = peak_memory_mb()
    block = torch.ones(int(before + 64) * 2**18)  # as much again as was ever held, in float32
    held = peak_memory_mb()
    del block
    assert held > before + 32 and peak_memory_mb() > held - 1
