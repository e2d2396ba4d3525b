"""What an item of the acceptance run is given, and what it finds: one figure a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from sip_engine.kernels._gpus import COLUMNS, GPU, MEASURED, gpu_of

PREDICTED = Path(__file__).with_name("predicted.json")
"""What `compile_report --json` wrote; made anew on any machine with Triton, no GPU needed."""


@dataclass(frozen=True)
class Figure:
    """One line of the table. `ok` is False where a check failed or a target was missed by what was measured."""

    item: int
    name: str
    measured: float | str
    unit: str = ""
    predicted: float | None = None
    target: str = ""
    peer: str = ""
    ok: bool = True
    note: str = ""


@dataclass
class Context:
    """What an item works with."""

    item: int
    out: Path
    """A folder of its own."""
    rehearse: bool = False
    """On the emulated device: tiny sizes, and figures that say nothing about a GPU."""
    profile: bool = False
    keep: Callable[[Figure], None] = print

    def say(self, name: str, measured: float | str, unit: str = "", **more: Any) -> None:
        """Write a figure down at once, so that it stays if the deadline ends what follows."""
        if isinstance(measured, float):
            measured = float(f"{measured:.4g}")
        self.keep(Figure(self.item, name, measured, unit, **more))

    def check(self, name: str, right: bool, note: str = "", **more: Any) -> None:
        """A figure that is right or wrong."""
        self.say(name, "ok" if right else "WRONG", ok=right, note=note, **more)

    @cached_property
    def device(self) -> str:
        """What the device calls itself."""
        import torch

        return torch.cuda.get_device_name()

    @property
    def rates(self) -> Path:
        """Rates that this run has measured, as `sip plan` and the compile report take them."""
        return self.out.parent / MEASURED.name

    def measured_rate(self, rate: str, value: float) -> None:
        """Write a rate of `gpus.toml` or `rates.toml` down; a rehearsal measures none."""
        if self.rehearse:
            return
        head = "" if self.rates.exists() else ",".join(COLUMNS) + "\n"
        row = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}", self.device.replace(",", " "), rate, f"{value:.4g}"
        with self.rates.open("a", encoding="utf-8") as file:
            file.write(head + ",".join(row) + "\n")

    @property
    def usual(self) -> GPU | None:
        """Ceilings of this kind of GPU by the tables; None if it is in none."""
        return gpu_of(self.device, MEASURED.read_text() if MEASURED.exists() else "")

    @property
    def ceilings(self) -> GPU | None:
        """The same, with what this run has measured before in place of the tables'."""
        path = self.rates if self.rates.exists() else MEASURED
        return gpu_of(self.device, path.read_text() if path.exists() else "")

    @cached_property
    def _predictions(self) -> dict[str, dict[str, Any]]:
        with suppress(OSError, ValueError):
            return {entry["kernel"]: entry for entry in json.loads(PREDICTED.read_text())}
        return {}

    def predicted_bytes(self, parts: Mapping[str, float]) -> float:
        """What the compile report counts that kernels move, each so often; 0 where none of them is in it."""
        return sum(
            self._predictions[kernel]["bytes"] * n
            for kernel, n in parts.items()
            if kernel in self._predictions
        )

    def predicted_us(self, parts: Mapping[str, float]) -> float | None:
        """The compile report's time of kernels at their reference shapes, each so often, on this GPU.

        In a rehearsal an H200's; None where some kernel, or this GPU, is not in the report.
        """
        gpu = "H200" if self.rehearse else self.usual.machine if self.usual else self.device
        times = [self._predictions.get(kernel, {}).get("predicted_us", {}).get(gpu) for kernel in parts]
        if not times or None in times:
            return None
        return round(sum(time * count for time, count in zip(times, parts.values(), strict=True) if time), 1)


def as_line(figure: Figure) -> str:
    return json.dumps(asdict(figure))
