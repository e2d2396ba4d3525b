"""What GPUs can do at most: one table, `gpus.toml`, and the measurements that take the place of its rates.

`measured` below is the text of a file of rows `date, machine, rate, value`, such as a GPU run writes (`MEASURED`).
"""

from __future__ import annotations

import csv
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from io import StringIO
from pathlib import Path

TABLE = Path(__file__).resolve().with_name("gpus.toml")
MEASURED = Path("benchmarks/results/gpu_rates.csv")
"""Of the checkout that is worked in: under the working directory."""
COLUMNS = ("date", "machine", "rate", "value")


@dataclass(frozen=True)
class GPU:
    """Ceilings of one GPU; units in the names (TB and TFLOP are powers of ten)."""

    machine: str
    """What a device calls itself holds this."""
    compute_capability: int
    num_sms: int
    clock_ghz: float
    copy_tb_s: float
    """Reads and writes together, of a large device copy."""
    gemm_bf16_tflop_s: float
    """Of a large matrix product."""
    gemm_fp8_tflop_s: float
    """0: it has no FP8."""
    peak_bf16_tflop_s: float
    """The maker's figure."""

    @property
    def copy_bytes_s(self) -> float:
        return self.copy_tb_s * 1e12

    @property
    def bf16_flops_s(self) -> float:
        return self.gemm_bf16_tflop_s * 1e12

    @property
    def scalar_ops_s(self) -> float:
        """128 lanes of a multiprocessor, an operation a cycle."""
        return 128 * self.num_sms * self.clock_ghz * 1e9

    @property
    def special_ops_s(self) -> float:
        """16 exponentials or logarithms a cycle."""
        return 16 * self.num_sms * self.clock_ghz * 1e9


RATES = tuple(field.name for field in fields(GPU) if field.name.endswith("_s"))


def load_gpus(measured: str = "") -> dict[str, GPU]:
    """Every GPU by the table's name, such as "h100", with the rates that `measured` holds for it.

    Raises:
        ValueError: `measured` is damaged, or a rate in it is not above 0.
    """
    found = {}
    for name, row in _table().items():
        rates = {rate: value for rate, value in newest(measured, row["machine"]).items() if rate in RATES}
        if any(not 0 < value < float("inf") for value in rates.values()):
            raise ValueError(f"a rate of {row['machine']} is not above 0: {rates}")
        found[name] = GPU(**row | rates)
    return found


def gpu_of(device: str, measured: str = "") -> GPU | None:
    """The GPU whose name stands in what a device calls itself; None if none does."""
    return next((gpu for gpu in load_gpus(measured).values() if gpu.machine in device), None)


def newest(measured: str, machine: str) -> dict[str, float]:
    """The newest value of each rate measured on a GPU whose name holds `machine`. ValueError for a damaged line."""
    found: dict[str, tuple[str, float]] = {}
    reader = csv.DictReader(StringIO(measured, newline=""))
    try:
        for row in reader:
            date, on, rate, value = row["date"], row["machine"], row["rate"], float(row["value"])
            if machine in on and (rate not in found or date >= found[rate][0]):
                found[rate] = date, value
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"line {reader.line_num} is not date, machine, rate and a number as value") from None
    return {rate: value for rate, (_, value) in found.items()}


@cache
def _table() -> dict[str, dict]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
