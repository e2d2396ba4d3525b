"""CUDA graphs on the emulated device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import Work
from torch.utils._pytree import tree_flatten

from emulated_cuda.streams import DeviceError, code_place, current, poison


class Graph:
    """A captured sequence of operations. See the head of this file."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._calls: list[Callable[[], None]] = []
        self._outside: dict[int, tuple[weakref.ref, str]] = {}
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.own: list[torch.Tensor] = []
        self._pool: list[Graph] = []
        self._captured = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        device = current()
        if device.stream == device.default_stream:
            raise DeviceError("CUDA graphs must be captured on a non-default stream")
        if device.graph is not None:
            raise DeviceError("a graph is being captured already")
        self._pool = pool if pool is not None else []
        self._pool.append(self)
        device.graph = self

    def capture_end(self) -> None:
        current().graph = None
        for storage, copy in self._saved.values():
            storage.copy_(copy)
        self._saved.clear()
        for value in self.own:
            poison(value)
        self._captured = True

    def pool(self) -> Any:
        return self._pool

    def reset(self) -> None:
        self.__init__()

    def before(self, touched: list) -> None:
        """Keep what outside memory holds, to give it back at the end."""
        own = {value.untyped_storage()._cdata for value in self.own}
        for tensor in touched:
            storage = tensor.value.untyped_storage()
            if storage._cdata not in own and storage._cdata not in self._outside:
                allocation = tensor.allocation
                self._outside[storage._cdata] = (
                    weakref.ref(allocation),
                    f"{allocation.place}, used at {code_place()}",
                )
                self._saved[storage._cdata] = (storage, storage.clone())

    def record_call(self, func: Any, args: Any, kwargs: Any, result: Any, touched: list) -> None:
        known = {
            x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)
        }
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        fresh = [x.untyped_storage()._cdata not in known for x in outputs]
        self.own += [x for x, new in zip(outputs, fresh, strict=True) if new]

        def call() -> None:
            found = tree_flatten(func(*args, **kwargs))[0]
            for work in found:
                if isinstance(work, torch.ScriptObject):  # a collective, which is in the graph's order here
                    Work.unbox(work).wait()
            again = [x for x in found if isinstance(x, torch.Tensor)]
            for old, new, is_fresh in zip(outputs, again, fresh, strict=True):
                if is_fresh:
                    old.copy_(new)

        self._calls.append(call)

    def record(self, call: Callable[[], None], touched: list) -> None:
        self.before(touched)
        self._calls.append(call)

    def replay(self) -> None:
        device = current()
        if not self._captured:
            raise DeviceError("called CUDAGraph::replay without a preceding successful capture")
        if device.graph is not None:
            raise DeviceError("a graph cannot be replayed while another is captured")
        device.note("replay")
        live = []
        for storage, (allocation, place) in self._outside.items():
            live.append(allocation() or device.allocation_at(storage))  # the same block, allocated again
            if live[-1] is None:
                raise DeviceError(
                    f"a replayed graph uses memory that was freed or rebound since: made at {place}"
                )
        for other in self._pool:
            for value in other.own if other is not self else ():
                poison(value)
        device.stamp(live + [device.allocation_of(value) for value in self.own])
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for call in self._calls:
                call()
