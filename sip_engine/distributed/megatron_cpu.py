"""Runs Megatron-core on a machine without CUDA: its `cuda` requests are answered by the CPU.

Megatron asks for "cuda" devices, CUDA random states and CUDA tensor type names in places that no setting
reaches. Inside `megatron_device()` those requests are redirected; with CUDA present it does nothing. The
function mode costs Python time on every torch call, so it is entered around Megatron's own code only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _is_cuda_request(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class _CudaMeansCpu(TorchFunctionMode):
    """Maps `device="cuda"` and integer devices to the CPU and makes `.cuda()` the identity."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer and the gradient clipper test for these names.
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        if "device" in kwargs and _is_cuda_request(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda_request(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _nothing(*_args: object, **_kwargs: object) -> None:
    return None


def _stream(*_args: object, **_kwargs: object) -> torch.cpu.Stream:
    return torch.cpu.current_stream()


def _cpu_rng_state(*_args: object, **_kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *_args: object, **_kwargs: object) -> None:
    torch.set_rng_state(state)


@functools.cache
def _patches() -> tuple[tuple[object, str, object], ...]:
    from megatron.core.tensor_parallel import random as megatron_random

    return (
        (torch.cuda, "current_device", lambda: "cpu"),
        (torch.cuda, "current_stream", _stream),  # asked for by Megatron-core 0.17 and later
        (torch.cuda, "synchronize", _nothing),
        (torch.cuda, "empty_cache", _nothing),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", _cpu_rng_state),
        (torch.cuda, "set_rng_state", _set_cpu_rng_state),
        (torch.cuda.nvtx, "range_push", _nothing),
        (torch.cuda.nvtx, "range_pop", _nothing),
        (megatron_random, "_get_cuda_rng_state", _cpu_rng_state),
        (megatron_random, "_set_cuda_rng_state", _set_cpu_rng_state),
    )


@contextmanager
def _cpu_in_place_of_cuda() -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, replacement in _patches():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(_CudaMeansCpu())
        yield


def megatron_device() -> AbstractContextManager[None]:
    """Enter around calls into Megatron-core; a no-op when CUDA is present."""
    return nullcontext() if torch.cuda.is_available() else _cpu_in_place_of_cuda()
