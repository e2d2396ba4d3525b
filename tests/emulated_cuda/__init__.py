"""An emulated CUDA device with true values: what CUDA runs, run on the CPU, with CUDA's rules enforced.

    with emulated_cuda() as cuda:
        model = build_model(...)            # torch.cuda.is_available() is True, tensors say `is_cuda`
        with cuda.watch() as seen:
            sampler.generate(...)
        assert seen["synchronise"] == 0     # `seen.places["synchronise"]` says where in our code

A device tensor is a wrapper whose Python properties `device` and `is_cuda` say cuda and whose `value` is an
ordinary CPU tensor; to torch's C++ it is a CPU tensor, so that no driver is asked for. Autograd, views, in-place
operations and collectives (gloo under NCCL's name) work. Enforced, as a `DeviceError` where CUDA fails or is wrong:

- **Two devices in one operation** fail; a CPU tensor without dimensions may take part, as a number.
- **Counters**, each with its place in our code: `synchronise` (the host waits for the device: `.item()`, `.cpu()`,
  `nonzero`, a copy that blocks), `wait` (for an event or a stream), `upload` and `read` (copies to and from the
  device), `launch` (kernels: aten operations that are no views, and Triton's), `triton` (those alone),
  `allocate` (new storage), `replay`, `empty_cache`.
- **Triton** launches go to the interpreter, and take device tensors only.
- **Streams and events**: an operation that touches what another stream wrote, or writes what another stream
  touched, without having been told to wait for it, is an error.
- **Pinned memory**: a read that does not block delivers when an event or stream after it has been waited for; until
  then the host finds poison. A pinned buffer rewritten before its upload was waited for is an error.
- **CUDA graphs**: capturing computes nothing (writes are undone, new memory is poisoned at the end) and refuses what
  waits or blocks. Replay writes the memory that was captured and allocates nothing. It is an error when memory it
  uses from outside has been freed, or rebound so that nobody holds it; what other graphs of its pool left behind
  is poisoned.
- With `cuda.reuses_blocks` freed memory is handed out again at its address, which a replay may then use.
- `torch.empty` gives poison: NaN, or the least integer.

Models begin with the weights that they have on the CPU, to be compared; `emulated_cuda(own_weights=True)` draws them
as CUDA does.

Not imitated: `torch.compile` (its functions run as they are written), time, kernels that really run at once, an
allocator's addresses, and CUDA's own rounding.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import InterpretedFunction

from emulated_cuda.device import Device
from emulated_cuda.graph import Graph
from emulated_cuda.streams import DeviceError, Event, Seen, Stream, active, current, numbers
from emulated_cuda.tensor import CallsOfTorch, EmulatedTensor, on_device, value_of

__all__ = ["Device", "DeviceError", "EmulatedTensor", "Seen", "emulated_cuda"]


@contextmanager
def _graph(
    graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    """`torch.cuda.graph`: waits, frees cached memory, and captures on a stream of its own."""
    device = current()
    device.note("synchronise")
    gc.collect()
    device.note("empty_cache")
    with _on_stream(stream or Stream()):
        device.stream.wait_stream(device.default_stream)
        graph.capture_begin(pool)
        try:
            yield
        except BaseException:
            device.graph = None
            raise
        graph.capture_end()


@contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    device = current()
    before = device.stream
    device.stream = stream or before
    try:
        yield
    finally:
        device.stream = before


def _synchronise(*_: Any) -> None:
    device = current()
    device.note("synchronise")
    device.deliver({number: 1 << 60 for number in range(1, next(numbers))})


def _empty_cache() -> None:
    if current().graph is not None:
        raise DeviceError("operation not permitted when stream is capturing: empty_cache")
    current().note("empty_cache")


def _random_state(*_: Any, **__: Any) -> torch.Tensor:
    return current().random.get_state()


def _set_random_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    current().random.set_state(value_of(state))


def _seed_random(seed: int) -> None:
    current().random.manual_seed(seed)


def _patches(device: Device, calls: CallsOfTorch, own_weights: bool) -> dict[Any, dict[str, Any]]:
    from megatron.core.tensor_parallel import random as megatron_random

    from sip_engine.policy import initialise

    def nothing(*_: Any, **__: Any) -> None:
        return None

    init, new_group, launch = dist.init_process_group, dist.new_group, InterpretedFunction.run

    def start(backend: Any = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        init("gloo", *args, **kwargs)

    def group(*args: Any, backend: Any = None, device_id: Any = None, **kwargs: Any) -> Any:
        return new_group(*args, backend=None, **kwargs)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if any(on_device(x) for x in tree_flatten((args, kwargs))[0]):
            return device.launch(kernel, launch, args, grid, kwargs)
        return launch(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    def allocated(*_: Any) -> int:
        return device.allocated_bytes

    def reserved(*_: Any) -> int:
        return device.allocated_bytes + device.spare_bytes

    backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with calls:  # `backward` is a call of torch itself, and what it calls would not be seen
            return backward(*args, **kwargs)

    cuda = {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "set_device": nothing, "init": nothing, "_lazy_init": nothing,
        "get_device_name": lambda *_: "emulated", "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(
            name="emulated", major=9, minor=0, multi_processor_count=132, total_memory=2**30, uuid="0"
        ),
        "device": lambda *_: nullcontext(), "synchronize": _synchronise, "empty_cache": _empty_cache,
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": _graph, "stream": _on_stream,
        "graph_pool_handle": list, "set_stream": lambda s: setattr(device, "stream", s),
        "current_stream": lambda *_: device.stream, "default_stream": lambda *_: device.default_stream,
        "is_current_stream_capturing": lambda: device.graph is not None,
        "mem_get_info": lambda *_: (device.free_bytes, 2**30), "memory_allocated": allocated,
        "max_memory_allocated": allocated, "memory_reserved": reserved,
        "reset_peak_memory_stats": nothing, "ipc_collect": nothing, "manual_seed": _seed_random,
        "manual_seed_all": _seed_random, "get_rng_state": _random_state,
        "set_rng_state": _set_random_state,
    }  # fmt: skip
    return {
        torch.cuda: cuda,
        initialise: {} if own_weights else {"draws_on": lambda _: False},
        # Optimizers ask through it where torch is built for CUDA.
        torch.accelerator: {"current_stream": lambda *_: device.stream, "current_device_index": lambda: 0},
        torch.cuda.nvtx: {"range_push": nothing, "range_pop": nothing},
        megatron_random: {
            "_get_cuda_rng_state": _random_state,
            "_set_cuda_rng_state": _set_random_state,
        },
        InterpretedFunction: {"run": run},
        torch.autograd: {"_engine_run_backward": run_backward},
        dist: {"init_process_group": start, "new_group": group},
        sys.modules["torch.distributed.distributed_c10d"]: {"new_group": group},
    }


@contextmanager
def emulated_cuda(*, own_weights: bool = False) -> Iterator[Device]:
    """A machine with one emulated device, for what runs inside."""
    device, calls = Device(), CallsOfTorch()
    with ExitStack() as stack:
        for owner, changes in _patches(device, calls, own_weights).items():
            for name, replacement in changes.items():
                stack.enter_context(mock.patch.object(owner, name, replacement))
        # What torch.compile would make one kernel of is run as it stands, kernel by kernel.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        active.append(device)
        stack.callback(active.pop)
        stack.enter_context(calls)
        yield device
