"""Signals that ask a run to end: the first is kept until the run can end well, a second ends the process at once.

A thread learns of each signal the moment it comes (through `signal.set_wakeup_fd`), also while the main thread is
inside a collective that will never return; so a deadline holds whatever the run is doing.
"""

from __future__ import annotations

import _thread
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from sip_engine.utils import heartbeat
from sip_engine.utils.errors import Stopped, exit_code_of, signal_name

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
_ECHO_SECONDS = 2.0
"""A terminal signals every process, and a launcher passes the same signal on: that close together they are one."""

_lock = threading.RLock()
_requested: int | None = None
_deferred = 0
_acknowledged = False
"""The main thread knows of the request: nothing is raised out of the blue any more."""
_raised: int | None = None
"""The signal that `Stopped` was raised for, out of the blue: whatever is raised after it comes of that."""
GRACE_S = 120.0
_grace_s = GRACE_S
_listening = False
_callbacks: weakref.WeakSet[Stoppable] = weakref.WeakSet()


class Stoppable:
    """Base of what waits for long and can be told, from any thread, not to."""

    def stop(self) -> None:
        """Make what is waiting raise soon, and what comes later too."""
        raise NotImplementedError


def stop_requested() -> int | None:
    """The signal that asked this run to end, here or on another process; None where none did."""
    return _requested


def stops(one: Stoppable) -> None:
    """Have it stopped as soon as the run is asked to end."""
    with _lock:
        _callbacks.add(one)


def request_stop(signum: int, *, here: bool = True) -> None:
    """Ask this process to end; only the first time counts. `here`: the signal came to this process itself."""
    global _requested
    with _lock:
        if _requested is not None:
            return
        _requested = signum
        callbacks = list(_callbacks)
    timer = threading.Timer(_grace_s, _out_of_time)
    timer.daemon = True
    timer.start()
    for one in callbacks:
        one.stop()
    if not here and _listening and not _deferred:
        _thread.interrupt_main(signal.Signals(signum))


@contextmanager
def catch_signals(grace_s: float = GRACE_S) -> Iterator[None]:
    """Within it, SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C raise `Stopped`, at once or, inside `deferred`, where it says.

    What a library, or a `try` around it, makes of a `Stopped` in its midst leaves the context as `Stopped` again.

    Args:
        grace_s: Seconds from the first signal to the end of the process, whatever it is doing then. After a signal,
            further ones end the process with the first one's code, also outside of the context.
    """
    global _grace_s, _requested, _listening, _acknowledged, _raised
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _grace_s, _requested, _acknowledged, _raised = grace_s, None, False, None
    listener, teller = socket.socketpair()
    listener.setblocking(True)
    teller.setblocking(False)
    before = {signum: signal.signal(signum, _raise_unless_deferred) for signum in SIGNALS}
    fd_before = signal.set_wakeup_fd(teller.fileno(), warn_on_full_buffer=False)
    _listening = True
    thread = threading.Thread(target=_listen, args=(listener,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        if _raised is None or isinstance(error, Stopped):
            raise
        raise Stopped(_raised) from error
    finally:
        _listening = False
        signal.set_wakeup_fd(fd_before)
        teller.close()
        thread.join(1.0)
        listener.close()
        ending = _acknowledged or _requested is not None  # the handler may know before the thread does
        for signum, handler in before.items():
            # A launcher passes signals on, late too: they must not change the code that this process leaves with.
            signal.signal(signum, _leave_silently if ending else handler)


def set_grace(grace_s: float) -> None:
    """Change the deadline of `catch_signals`: a command knows it when its settings are read."""
    global _grace_s
    _grace_s = grace_s


@contextmanager
def deferred() -> Iterator[None]:
    """Within it a signal raises nothing by itself: the run looks at `stop_requested` where it can end well."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1


def acknowledge(signum: int) -> None:
    """For the main thread: the processes have agreed to end, and it is doing so."""
    global _acknowledged
    _acknowledged = True
    request_stop(signum)


def _raise_unless_deferred(signum: int, frame: FrameType | None) -> None:
    global _acknowledged, _raised
    del frame
    if not _deferred and not _acknowledged:
        _acknowledged, _raised = True, signum
        raise Stopped(signum)


def _leave_silently(signum: int, frame: FrameType | None) -> None:
    del frame
    os._exit(exit_code_of(_requested or signum))


def _listen(listener: socket.socket) -> None:
    first = 0.0
    while data := _read(listener):
        for signum in data:
            if not _listening or signum not in SIGNALS:
                continue
            if not first:
                first = time.monotonic()
                _say(f"{signal_name(signum)}: ending after what can be saved, within {_grace_s:g} s")
                request_stop(signum)
            elif time.monotonic() - first > _ECHO_SECONDS:
                leave_now(f"{signal_name(signum)} again: ended at once, nothing more is saved", signum)


def _read(listener: socket.socket) -> bytes:
    with suppress(OSError):
        return listener.recv(64)
    return b""


def _out_of_time() -> None:
    assert _requested is not None
    leave_now(
        f"{signal_name(_requested)}: {heartbeat.position()} did not end within faults.grace_s={_grace_s:g}; the same "
        "command goes on from the newest checkpoint",
        _requested,
    )


def leave_now(message: str, signum: int) -> None:
    """End the process without another word, as a signal's second call does."""
    _say(message)
    os._exit(exit_code_of(signum))


def _say(message: str) -> None:
    rank = os.environ.get("RANK")
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{f'rank {rank}: ' if rank else ''}{message}\n")
        sys.stderr.flush()
