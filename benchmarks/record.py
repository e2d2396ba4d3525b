"""What every measurement shares: timing a call, date, commit, machine, versions, command as CSV, and its picture."""

from __future__ import annotations

import csv
import platform
import subprocess
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: a whole number that is not below `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise ArgumentTypeError(f"{text}: must be {least} or more")
        return int(text)

    number.__name__ = "whole number"  # argparse says "invalid whole number value"
    return number


def machine() -> str:
    """Name of the GPU, or of the processor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{len(names) or '?'} cores of {name}"


def commit() -> str:
    """Short hash of the checked-out commit, with -dirty if files have changed since; "none" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "none"
    return result.stdout.strip() or "none"


def header(name: str, packages: Sequence[str] = ("torch",)) -> dict[str, object]:
    """The columns that say where, when and how the figures of benchmark `name` came about."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "command": " ".join([f"python -m benchmarks {name}", *sys.argv[2:]]),
    }


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call, the device idle before and after."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write `rows` with a header line; the file appears whole or not at all."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `write_csv` wrote, numbers as numbers. DataError where it cannot be read."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a CSV file of this benchmark") from None


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def add_plot_option(parser: ArgumentParser) -> None:
    """`--plot CSV`, for a benchmark that can draw its figures."""
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="CSV",
        help="measure nothing: draw this file of an earlier run as SVG beside it",
    )


def plain_pyplot() -> Any:
    """Matplotlib's interface, drawing to SVG files without a screen, the same file for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sip-engine"
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: small files
    from matplotlib import pyplot

    return pyplot


def save_svg(figure: Any, path: Path) -> None:
    """Write a figure, without the date, and close it."""
    figure.savefig(path, metadata={"Date": None})
    plain_pyplot().close(figure)
    print(path)
