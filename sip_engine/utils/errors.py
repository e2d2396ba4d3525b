"""Typed errors for users; the command line prints them as one line and exits with `exit_code`."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class SipError(Exception):
    """Base of every error a user can cause or must act on.

    The message says what was wrong, which rule it broke and what to do, in one line.
    """

    exit_code = 1
    resumable = False
    """Raised on every process alike, with the run in a state from which it can go on: that state is saved first."""


class ConfigError(SipError, ValueError):
    """A setting is unknown, out of range, or in conflict with another one."""

    exit_code = 2


class AloneError(ConfigError):
    """The environment tells of other processes, and the command is one: no other is there to say so."""


class DataError(SipError, ValueError):
    """Input text, token files or prompts are missing, empty or not what they should be."""

    exit_code = 3


class CheckpointError(SipError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 4


class RequestError(SipError, ValueError):
    """A generation or scoring request breaks a rule; raised before any page is taken."""

    exit_code = 5


class NonFiniteError(SipError):
    """A loss or gradient is not finite; raised before the update, on every rank alike."""

    exit_code = 6


class ThresholdError(SipError):
    """A monitored quantity (judge failures, sampler drift, ...) crossed its limit; the run stops."""

    exit_code = 7


class PeerError(SipError):
    """Another process of the run is gone, stopped or hangs, so that this one cannot go on."""

    exit_code = 8


class Stopped(SipError):
    """A signal asked the run to end; what was finished by then is saved where that was possible."""

    resumable = True

    def __init__(self, signum: int, message: str = "") -> None:
        self.signum = signum
        super().__init__(message or f"stopped by {signal_name(signum)}")

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, str]]:
        return Stopped, (self.signum, str(self))

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """130 after Ctrl-C, as shells have it; 75 (EX_TEMPFAIL) otherwise: run the same command again."""
        return exit_code_of(self.signum)


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "an error of the program itself; its traceback, and crash/ in the run's folder, say more",
    2: "a setting, an option or the way the processes were started is wrong",
    3: "input data, prompts or records are missing, damaged or cannot be written",
    4: "a checkpoint is missing, damaged, of another model, or cannot be written",
    5: "a generation or scoring request breaks a rule",
    6: "a loss, gradient or parameter is not finite",
    7: "a watched quantity crossed its limit; where the state before was good it is saved",
    8: "another process of the run is gone, stopped or hangs; or some runs of a reproduction failed",
    9: "a planned run does not fit its hardware",
    75: "preempted (SIGTERM, SIGHUP, SIGUSR1): saved; run the same command again",
    130: "interrupted (Ctrl-C): saved; the same command goes on",
}
"""Every exit code of `sip`, and what it means."""


def first_fault(error: ValidationError) -> str:
    """The first of pydantic's faults in one line: where, and what."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    message = " ".join(fault["msg"].removeprefix("Value error, ").split())
    return f"{where}: {message}" if where else message


def exit_code_of(signum: int) -> int:
    """The exit code of a run that a signal has ended."""
    return 130 if signum == signal.SIGINT else 75


def signal_name(signum: int) -> str:
    """As a user knows it: "Ctrl-C", "SIGTERM"."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
