"""Streams, events, allocations and counters of the emulated device, and what its parts share."""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from emulated_cuda.device import Device

ROOT = Path(__file__).resolve().parents[2]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class DeviceError(RuntimeError):
    """CUDA would fail here, or be silently wrong."""


class Seen(Counter):
    """Counts by kind; `places[kind]` counts the lines of our code they came from, `kernels` Triton's by name."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, Counter] = defaultdict(Counter)
        self.kernels: Counter = Counter()


class Allocation:
    """One storage of the device, alive as long as a device tensor over it is."""

    def __init__(self, storage: torch.UntypedStorage, place: str) -> None:
        self.storage, self.place = storage, place
        self.write: tuple[int, int] | None = None
        self.reads: dict[int, int] = {}
        """stream -> its operation"""


class Stream:
    """A queue of operations; `known` says up to which operation of each other stream it has waited."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.cuda_stream = next(numbers)
        self.device = CUDA
        self.now = 0
        self.known: dict[int, int] = {}

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        merge(self.known, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        current().wait(self.known | {self.cuda_stream: self.now})

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return current().graph is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return self.cuda_stream


class Event:
    """A point of a stream. `query` says no once before it says yes, as a host that asks at once would hear."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: dict[int, int] = {}
        self._asked = True

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current().stream
        self.clock, self._asked = stream.known | {stream.cuda_stream: stream.now}, False

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current().stream).wait_event(self)

    def query(self) -> bool:
        was_asked, self._asked = self._asked, True
        if was_asked:
            current().deliver(self.clock)
        return was_asked

    def synchronize(self) -> None:
        self._asked = True
        current().wait(self.clock)

    def elapsed_time(self, other: Event) -> float:
        return 1.0


numbers = itertools.count(1)
active: list[Device] = []


def current() -> Device:
    return active[-1]


def merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, now in other.items():
        clock[stream] = max(now, clock.get(stream, 0))


def poison(value: torch.Tensor) -> None:
    value = value.detach()
    if value.dtype.itemsize == 1 and value.dtype.is_floating_point:
        value.view(torch.uint8).fill_(0x7F)  # float8's NaN
    elif value.dtype.is_floating_point:
        value.fill_(float("nan"))
    elif value.dtype not in (torch.bool, torch.uint8) and not value.dtype.is_complex:
        value.fill_(torch.iinfo(value.dtype).min)


def is_cuda(device: object) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    return isinstance(device, int) or str(device).startswith("cuda")


def code_place() -> str:
    """File and line of the innermost frame that is our own code, not this file."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = _our_name(frame.f_code.co_filename)
        if name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@functools.cache
def _our_name(path: str) -> str | None:
    """A file's place in the tree; None for other people's code and this file."""
    file = Path(path).resolve()
    if (
        not file.is_relative_to(ROOT)
        or "site-packages" in file.parts
        or file.parent == Path(__file__).resolve().parent
    ):
        return None
    return str(file.relative_to(ROOT))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.numel() else True
    )
