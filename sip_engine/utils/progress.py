"""Progress with an ETA: a rich bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

console = Console(stderr=True, highlight=False, markup=False)
"""Says things as they are, for paths and texts hold brackets; for colours say markup=True, and escape the rest."""
LINE_SECONDS = 15.0


class Steps:
    """Counts steps towards a total and shows the latest figures beside them."""

    def __init__(self, title: str, done: int, total: int, bar: Progress | None, quiet: bool) -> None:
        self._title, self._done, self._total = title, done, total
        self._bar, self._quiet = bar, quiet
        self._task = None if bar is None else bar.add_task(title, total=total, completed=done, note="")
        self._started = self._printed = time.monotonic()
        self._first = done

    def advance(self, figures: Mapping[str, float]) -> None:
        """One step is done; `figures` are shown with it."""
        self._done += 1
        note = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, note=note)
        elif not self._quiet and (self._due() or self._done == self._total):
            self._printed = time.monotonic()
            rate = (self._printed - self._started) / (self._done - self._first)
            eta = rate * (self._total - self._done)
            console.print(
                f"{self._title}: {self._done}/{self._total}  {note}  ETA {eta:.0f} s", soft_wrap=True
            )

    def _due(self) -> bool:
        return time.monotonic() - self._printed > LINE_SECONDS


@contextmanager
def steps(title: str, total: int, *, done: int = 0, quiet: bool = False) -> Iterator[Steps]:
    """Show progress of `total` steps, of which `done` were made before. `quiet` shows nothing."""
    if quiet or not console.is_terminal:
        yield Steps(title, done, total, None, quiet)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        yield Steps(title, done, total, bar, quiet)


class Transfer:
    """Counts bytes towards a total."""

    def __init__(self, title: str, total: int, bar: Progress | None, quiet: bool) -> None:
        self._title, self._total, self._done = title, total, 0
        self._bar, self._quiet, self._lock = bar, quiet, threading.Lock()
        self._task = None if bar is None else bar.add_task(title, total=total)
        self._started = self._printed = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """So many more; from any thread."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, num_bytes)
            return
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if self._quiet or not self._done or now - self._printed <= LINE_SECONDS:
                return
            self._printed = now
        rate = self._done / (now - self._started)
        console.print(
            f"{self._title}: {self._done / 1e9:.2f}/{self._total / 1e9:.2f} GB  {rate / 1e6:.1f} MB/s  "
            f"ETA {(self._total - self._done) / rate:.0f} s",
            soft_wrap=True,
        )


@contextmanager
def transfer(title: str, total: int, *, quiet: bool = False) -> Iterator[Transfer]:
    """Show progress through `total` bytes, on a terminal until it is done. `quiet` shows nothing."""
    if quiet or not console.is_terminal:
        yield Transfer(title, total, None, quiet)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Transfer(title, total, bar, quiet)
