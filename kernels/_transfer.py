"""Copies between host and device that do not wait: through pinned memory beside CUDA, plainly on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def place(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor that nobody else holds, on the device, for what is queued after it; itself on the CPU."""
    return host if device.type != "cuda" else host.pin_memory().to(device, non_blocking=True)


def upload(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """A copy of `array` on the device, for what is queued after it; the array may change at once."""
    host = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    return host.clone() if device.type != "cuda" else place(host, device)


class Read:
    """A copy of a device tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        """The copy is queued behind what the device has been told to do so far."""
        self._done = None
        if not tensor.is_cuda:
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def get(self) -> np.ndarray:
        """The values; waits until they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.numpy()
