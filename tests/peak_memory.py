"""Memory that torch operations take, on any device: what they return, for as long as it lives."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Within it, bytes of new storages: the `largest` one, and the `peak` of those alive at a time.

    Storages seen first as an argument are not new. What an operation takes and frees by itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = self.live = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._meet(tensor, new=True)
        return result

    def _meet(self, tensor: Any, new: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if new else 0
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size
