"""Ends every process of a run within a set time when one is gone, stopped or hangs, naming rank, step and phase.

A thread on each process writes a heartbeat (a count, and the main thread's position) to the store that the
processes met in; rank 0 reads all of them and writes what it concludes, the others read that and rank 0's own. A
request to stop that came to one process reaches all of them the same way, also those that wait in a collective.

Why not what there is: torch's flight recorder keeps the last nccl collectives for a person to read afterwards; it
ends nothing and knows neither gloo nor steps. NVRx (nvidia-resiliency-ext 0.4) kills and restarts ranks, in the
process or by a launcher of its own; here the launcher restarts, and all that is needed is a line and an end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from sip_engine.distributed.mesh import control_store
from sip_engine.utils import heartbeat, stopping
from sip_engine.utils.errors import PeerError, SipError

_VERDICT, _STOP = "verdict", "stop"
_LEAST_PAUSE_S = 0.05
"""Between two heartbeats, which are also given when a phase is entered."""
_SILENT_SHARE, _STILL_SHARE = 0.5, 0.8
"""Shares of the timeout after which a process counts as gone, and a run in which nobody gets on as hung."""


@dataclass
class Beat:
    """What a process last said of itself."""

    count: int = 0
    progress: int = 0
    step: int = 0
    phase: str = "start"
    waits: bool = False
    collective: bool = False
    """Its main thread is inside one of torch's collectives, waiting for others."""
    left: int | None = None
    """Its exit code, once it has left."""
    why: str = ""

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


@dataclass
class _Seen:
    """A process as seen from here: its last beat, and when its count and its progress last changed, by our clock."""

    beat: Beat
    heard: float
    moved: float


class Observer:
    """Draws the conclusions: told what each process says and what time it is, says what is wrong."""

    def __init__(self, size: int, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._seen = [_Seen(Beat(), now, now) for _ in range(size)]

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        seen = self._seen[rank]
        if beat.count != seen.beat.count:
            seen.heard = now
        if beat.progress != seen.beat.progress or beat.waits:
            seen.moved = now
        seen.beat = beat

    def silent(self, now: float, seconds: float) -> list[int]:
        """Ranks not heard of for that long, of those that have not left."""
        return [
            rank
            for rank, seen in enumerate(self._seen)
            if seen.beat.left is None and now - seen.heard > seconds
        ]

    def failed(self) -> list[int]:
        """Ranks that have left by an error or a signal."""
        return [rank for rank, seen in enumerate(self._seen) if seen.beat.left]

    def conclusion(self, now: float) -> str:
        """What is wrong by now, in words that name rank, step and phase; "" while all is well."""
        gone = self.silent(now, self._timeout_s * _SILENT_SHARE)
        if gone:
            return self.say_gone(gone[0], now)
        working = [(rank, seen) for rank, seen in enumerate(self._seen) if seen.beat.left is None]
        if not working or min(now - seen.moved for _, seen in working) <= self._timeout_s * _STILL_SHARE:
            return ""
        # The one at fault is not itself in a collective, or it is behind the others.
        rank, seen = min(working, key=lambda one: (one[1].beat.collective, one[1].beat.step, one[1].moved))
        others = "" if len(working) == 1 else "; the others wait for it"
        return f"rank {rank} hangs in {seen.beat}, for {now - seen.moved:.0f} s{others}"

    def say_gone(self, rank: int, now: float) -> str:
        seen = self._seen[rank]
        return (
            f"rank {rank} was last heard of {now - seen.heard:.0f} s ago, in {seen.beat}: killed, stopped, or its "
            "machine is lost"
        )

    def say_left(self, rank: int) -> tuple[int, str]:
        """Exit code and words of a rank that has left by an error."""
        beat = self._seen[rank].beat
        code = beat.left if beat.left and beat.left != 1 else PeerError.exit_code  # a mistake is not ours
        return code, f"rank {rank} ended in {beat}: {beat.why}"


class Watchdog:
    """The thread; a context around everything that a run does together.

    Args:
        timeout_s: Seconds within which every process ends when one cannot go on; 0 watches nothing, and only passes
            requests to stop.
        on_end: Called with the reason before the process is ended from the thread.
    """

    def __init__(self, timeout_s: float, on_end: Callable[[str], object] = lambda reason: None) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._timeout_s, self._on_end = timeout_s, on_end
        self._interval = max(min(1.0, timeout_s / 20), 2 * _LEAST_PAUSE_S) if timeout_s else 1.0
        self._count = 0
        self._told_stop = False
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._main = threading.main_thread().ident
        self._store: Any = control_store()
        self._observer = Observer(self._size, timeout_s, time.monotonic())
        self._answers = 0
        """Times that the store has answered all that was asked; stands still where it does not."""
        self._fault = ""
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._guard = threading.Thread(target=self._await_store, name="watchdog's guard", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beat()
        if self._rank == 0:
            self._store.set(_VERDICT, "")
            self._store.set(_STOP, "")
        if self._size > 1:
            dist.barrier()
        self._thread.start()
        if self._size > 1:
            self._guard.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._closing.set()
        heartbeat.entered.set()
        self._thread.join(5.0)
        code = 0
        if error is not None:
            code = error.exit_code if isinstance(error, SipError) else getattr(error, "code", 1) or 1
        with suppress(Exception):
            self._beat(left=int(code), why=" ".join(str(error).split())[:300] if error else "")
        known = code == 0 or getattr(error, "resumable", False)  # all leave, and each knows why
        if self._rank == 0 and self._size > 1 and not known:
            time.sleep(3 * self._interval)  # the store may end with this process: let the others read
        self._left.set()

    def explain(self, error: BaseException) -> SipError | None:
        """Why a collective failed here: what became of another process; None where all of them are well.

        Waits a few heartbeats to see who is silent.
        """
        if self._size == 1:
            return None
        until = time.monotonic() + max(6 * self._interval, 1.0)
        unread = ""
        while time.monotonic() < until:
            time.sleep(self._interval / 2)
            try:
                self._hear_all()
                unread = ""
            except Exception as fault:  # torch raises many types where the store is gone
                unread = _first_line(fault)
            with self._lock:
                others = [rank for rank in self._observer.failed() if rank != self._rank]
            if others:
                code, why = self._observer.say_left(others[0])
                return _with_code(PeerError(self._line(why)), code)
        if unread:
            return PeerError(
                self._line(f"rank 0 or the launcher is gone: their store does not answer ({unread})")
            )
        now = time.monotonic()
        gone = [rank for rank in self._observer.silent(now, 4 * self._interval) if rank != self._rank]
        return PeerError(self._line(self._observer.say_gone(gone[0], now))) if gone else None

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closing.wait(_LEAST_PAUSE_S):
            heartbeat.entered.wait(self._interval - _LEAST_PAUSE_S)
            heartbeat.entered.clear()
            try:
                self._beat()
                if time.monotonic() - looked >= self._interval:
                    looked = time.monotonic()
                    self._look()
                self._answers, self._fault = self._answers + 1, ""
            except Exception as error:  # torch raises many types where the store is gone
                self._fault = _first_line(error)

    def _await_store(self) -> None:
        """End the process where the store stays silent: what asks it may wait without end, as where a line is cut.

        Time is counted in turns of this thread: while the process itself was stopped there are none.
        """
        patience = min(self._timeout_s * _SILENT_SHARE or 60.0, 60.0)
        answers, silent_s = 0, 0.0
        while not self._left.wait(self._interval):
            answers, silent_s = self._answers, 0.0 if self._answers != answers else silent_s + self._interval
            if silent_s > patience:
                why = self._fault or f"no answer for {silent_s:.0f} s"
                self._end(
                    f"rank 0 or the launcher is gone, or the line to it: their store does not answer ({why})"
                )

    def _look(self) -> None:
        stop = self._store.get(_STOP).decode() if self._size > 1 else ""
        mine = stopping.stop_requested()
        if mine and not self._told_stop:
            self._told_stop = True
            if not stop:
                self._store.set(_STOP, str(int(mine)))
        elif stop and not mine:
            stopping.request_stop(int(stop), here=False)
        if not self._timeout_s:
            return
        self._hear_all() if self._rank == 0 else self._hear(0)
        with self._lock:
            wrong = self._observer.conclusion(time.monotonic()) if self._rank == 0 else ""
            if self._rank and 0 in self._observer.silent(time.monotonic(), self._timeout_s * _STILL_SHARE):
                wrong = self._observer.say_gone(0, time.monotonic())
        told = self._store.get(_VERDICT).decode() if self._rank else ""
        if wrong and self._rank == 0:
            self._store.set(_VERDICT, wrong)
        if wrong or told:
            self._end(wrong or told)

    def _beat(self, left: int | None = None, why: str = "") -> None:
        self._count += 1
        at = heartbeat.position()
        beat = Beat(self._count, at.progress, at.step, at.phase, at.waits, self._in_collective(), left, why)
        self._store.set(f"beat/{self._rank}", json.dumps(vars(beat)))

    def _hear_all(self) -> None:
        keys = [f"beat/{rank}" for rank in range(self._size)]
        found = self._store.multi_get(keys) if self._store.has_extended_api() else map(self._store.get, keys)
        now = time.monotonic()
        with self._lock:
            for rank, text in enumerate(found):
                self._observer.hear(rank, _beat_of(json.loads(text)), now)

    def _hear(self, rank: int) -> None:
        beat = _beat_of(json.loads(self._store.get(f"beat/{rank}")))
        with self._lock:
            self._observer.hear(rank, beat, time.monotonic())

    def _in_collective(self) -> bool:
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            if "torch/distributed/" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False

    def _line(self, reason: str) -> str:
        return (
            f"{reason}; this is rank {self._rank} in {heartbeat.position()}; the newest checkpoint is whole"
        )

    def _end(self, reason: str) -> None:
        """End the process from here: the main thread may never come back."""
        with suppress(OSError, ValueError):
            sys.stderr.write(f"error: {self._line(reason)}\n")
            sys.stderr.flush()
        with suppress(Exception):
            self._on_end(reason)
        os._exit(PeerError.exit_code)


def _with_code(error: PeerError, code: int) -> PeerError:
    error.exit_code = code
    return error


def _beat_of(values: Mapping[str, Any]) -> Beat:
    return Beat(**values)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0][:120]
