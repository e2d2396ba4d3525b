"""When a run was at work and how each time ended: `sessions.jsonl`, and the state that a run's folder tells of.

A session that was killed leaves no end: it is over where nobody holds the folder any more.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sip_engine.utils.errors import SipError, Stopped
from sip_engine.utils.jsonl import read_jsonl
from sip_engine.utils.regular import open_regular, read_text

SESSIONS = "sessions.jsonl"
FINISHED, RUNNING, DEAD, PREEMPTED = "finished", "running", "dead", "preempted"
INTERRUPTED, FAILED, STOPPED = "interrupted", "failed", "stopped"


@dataclass(frozen=True)
class Session:
    """A time that a run was at work; `ended` and what follows are None where it left no end."""

    began: float
    """Seconds since the epoch, as `ended`."""
    from_step: int
    """Updates made before it."""
    host: str = ""
    ranks: int = 1
    ended: float | None = None
    how: str | None = None
    code: int | None = None
    step: int | None = None
    """Updates made, and saved where that was possible, when it ended."""


@contextmanager
def session(out: Path, ranks: int, step: Callable[[], int], *, enabled: bool) -> Iterator[None]:
    """Write down begin and end of what is done within. A full disk does not stop a run."""
    if not enabled:
        yield
        return
    path = out / SESSIONS
    began = {
        "began": time.time(),
        "step": step(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ranks": ranks,
    }
    _append(path, began)
    how, code = FINISHED, 0
    try:
        yield
    except Stopped as error:
        how, code = (INTERRUPTED if error.exit_code == 130 else PREEMPTED), error.exit_code
        raise
    except SipError as error:
        how, code = f"{FAILED}: {error}", error.exit_code
        raise
    except BaseException as error:
        how, code = f"{FAILED}: {type(error).__name__}: {error}", 1
        raise
    finally:
        _append(
            path, {"ended": time.time(), "step": step(), "how": " ".join(how.split())[:300], "code": code}
        )


def read_sessions(out: Path) -> list[Session]:
    """In order; empty where none was recorded. Raises DataError."""
    path = out / SESSIONS
    found: list[Session] = []
    if not path.exists():
        return found
    for _, row in read_jsonl(path, complete_lines=True):
        if "began" in row:
            began, step, ranks = (_number(row.get(name)) for name in ("began", "step", "ranks"))
            found.append(Session(began, int(step), str(row.get("host", "")), int(ranks) or 1))
        elif found and found[-1].ended is None:
            last, (ended, code, step) = (
                found[-1],
                (_number(row.get(name)) for name in ("ended", "code", "step")),
            )
            found[-1] = Session(
                last.began,
                last.from_step,
                last.host,
                last.ranks,
                ended,
                str(row.get("how")),
                int(code),
                int(step),
            )
    return found


def state_of(out: Path, sessions: list[Session], step: int, steps: Any) -> str:
    """What a run is doing, in a word, and why where it failed: from its folder alone.

    step: of its newest record. steps: those it is to make; None where that is not known.
    """
    if is_held(out):
        return RUNNING if len(sessions) < 2 else f"{RUNNING}, start {len(sessions)}"
    if isinstance(steps, int) and step >= steps and (not sessions or sessions[-1].how in (FINISHED, None)):
        return FINISHED
    if not sessions:
        return STOPPED
    how = sessions[-1].how
    if how is None:
        reason = _crash_reason(out)
        return f"{DEAD}: {reason}" if reason else DEAD
    if how == FINISHED:  # and more steps are wanted now
        return STOPPED
    return f"{how}, to be started again" if how == PREEMPTED else how


def is_held(out: Path) -> bool:
    """Whether a process is at work in a run's folder (`files.lock_folder`); False on a file system without locks."""
    with suppress(OSError), open_regular(out / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _crash_reason(out: Path) -> str:
    """The first words of the bundle that a crash leaves."""
    for path in sorted((out / "crash").glob("rank_*.txt")):
        with suppress(OSError, ValueError, IndexError):
            return read_text(path).splitlines()[1][:300]
    return ""


def _append(path: Path, row: dict[str, Any]) -> None:
    with suppress(OSError), open_regular(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
