"""Where this process is in its run, and whether it gets on: step, phase and a count that grows with progress.

One for the process: the loop and what it calls say where they are, the watchdog reads it from its own thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """Where a process was when it was asked."""

    step: int
    """The step being made, from 1."""
    phase: str
    progress: int
    """Grows whenever the process gets on; stands still where it hangs."""
    waits: bool
    """It waits for something that has a deadline of its own, such as a server's reply."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


entered = threading.Event()
"""Set whenever a phase is entered; cleared by who waits for it."""
_lock = threading.Lock()
_step, _phase, _progress, _waiting = 0, "start", 0, 0


def position() -> Position:
    """Where this process is now."""
    with _lock:
        return Position(_step, _phase, _progress, _waiting > 0)


def tick() -> None:
    """Say that this process gets on."""
    global _progress
    with _lock:
        _progress += 1


def enter(phase: str, step: int | None = None) -> None:
    """Go into a phase, of another step if one is given."""
    global _step, _phase, _progress
    with _lock:
        _step, _phase, _progress = _step if step is None else step, phase, _progress + 1
    entered.set()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase, and after it the one before."""
    before = position().phase
    enter(name)
    yield
    enter(before)  # not after an error: that happened in the inner phase


@contextmanager
def waiting() -> Iterator[None]:
    """Within it, standing still is no hang: what is waited for ends by itself. From any thread."""
    global _waiting
    with _lock:
        _waiting += 1
    try:
        yield
    finally:
        with _lock:
            _waiting -= 1
        tick()
