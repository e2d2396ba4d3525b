"""What a tracker is, and all trackers of a run together: one that fails is said once and gone on without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from sip_engine.config.backends import TRACKERS
from sip_engine.config.schema import RunConfig
from sip_engine.utils.progress import console

T = TypeVar("T")


class Tracker(Protocol):
    """Shows metrics somewhere. Lives on the first process."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics that were recorded of a step, finite numbers; names are nested by `/`."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


def register_tracker(name: str) -> Callable[[T], T]:
    """A decorator for an opener `(cfg: RunConfig, from_step: int) -> Tracker`; `tracking.use` then may name it.

    A run that goes on after a restart opens its trackers with the first step that it will make, 0 for a new one.
    """
    return TRACKERS.register(name)


class Trackers:
    """Those that the settings name."""

    def __init__(self, cfg: RunConfig, from_step: int) -> None:
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(cfg.tracking.use):
            self._guarded(
                name, lambda name=name: self._open.update({name: TRACKERS.get(name)(cfg, from_step)})
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(step, values))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.close)

    def _guarded(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            self._open.pop(name, None)
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            console.print(f"tracker {name}: {reason[:300]}; going on without it", soft_wrap=True)
