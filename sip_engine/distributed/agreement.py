"""What all processes of a run agree on: to end, to fail alike, and that they were started with the same settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from signal import SIGTERM
from typing import Any

import torch.distributed as dist

from sip_engine.distributed.mesh import Mesh
from sip_engine.utils.errors import ConfigError, NonFiniteError, SipError, Stopped
from sip_engine.utils.stopping import acknowledge, stop_requested

_NONE = "not set"


@contextmanager
def raised_together(mesh: Mesh) -> Iterator[None]:
    """A SipError of one process within it, or its request to stop, is raised on all of them at its end.

    One small collective of the world, so: nothing within it may wait for a process of another replica.

    Raises:
        SipError: the first failing rank's, on every process, marked as resumable.
    """
    failed: SipError | None = None
    try:
        yield
    except SipError as error:
        failed = error
    signum = stop_requested()
    if failed is None and signum is not None:
        failed = Stopped(signum)
    if not mesh.any(failed is not None):
        return
    first = next(error for error in mesh.gather(failed) if error is not None)
    if isinstance(first, Stopped):
        acknowledge(first.signum)
    if not isinstance(first, NonFiniteError):
        first.resumable = True
    raise first from failed


def stop_between(mesh: Mesh) -> None:
    """Raise `Stopped` on every process of a replica if one of them was asked to end. A collective of the replica."""
    signum = stop_requested()
    if mesh.any_in_replica(signum is not None):
        raise Stopped(signum or SIGTERM)


def raise_agreed_stop(rows: list[list[float]]) -> None:
    """Raise `Stopped` where the first column, `stop_flag()`, of a `Mesh.table` says that one process was asked to."""
    signum = int(max(row[0] for row in rows))
    if signum:
        acknowledge(signum)
        raise Stopped(signum)


def stop_flag() -> float:
    """The signal that asked this process to end, 0 without one."""
    return float(stop_requested() or 0)


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """Compare the settings that the processes of the world were started with: their hashes, then what differs.

    Raises:
        ConfigError: on every process; they differ, with the name of the first setting that does.
    """
    size = dist.get_world_size()
    if size == 1:
        return
    text = json.dumps(settings, sort_keys=True, default=str)
    hashes: list[Any] = [None] * size
    dist.all_gather_object(hashes, hashlib.sha256(text.encode()).hexdigest())
    if len(set(hashes)) == 1:
        return
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, json.loads(text))
    for rank, other in enumerate(everyone):
        found = _first_difference(everyone[0], other)
        if found is not None:
            name, first, its = found
            raise ConfigError(
                f"the processes were started with different settings: {name} is {first} on rank 0 and {its} on rank "
                f"{rank}; start all of them with the same"
            )


def _first_difference(ours: Any, theirs: Any, name: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys([*ours, *theirs]):
            inner = f"{name}.{key}".lstrip(".")
            found = _first_difference(ours.get(key, _NONE), theirs.get(key, _NONE), inner)
            if found is not None:
                return found
        return None
    return None if ours == theirs else (name, ours, theirs)
