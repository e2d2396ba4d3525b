"""The device: it runs operations on device tensors, copies, and counts what the host sees of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from emulated_cuda.streams import (
    CPU,
    Allocation,
    DeviceError,
    Seen,
    Stream,
    code_place,
    merge,
    poison,
    same_bits,
)
from emulated_cuda.tensor import EmulatedTensor, non_blocking_of, on_device, value_of

aten = torch.ops.aten

_WAITING = {  # operations whose result's shape or value the host must know
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.repeat_interleave, aten.is_nonzero, aten.bincount,
}  # fmt: skip
_NO_KERNEL = {
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    aten.empty_strided,
    aten.new_empty_strided,
    aten.detach,
}


class Device:
    """The one device: memory, streams, counters."""

    def __init__(self) -> None:
        self.default_stream = self.stream = Stream()
        self.seen = [Seen()]
        self.host: dict[int, int] = {}
        """What the host has waited for."""
        self.graph: Any = None
        """The one that is being captured."""
        self.free_bytes = 2**30
        self.spare_bytes = 0
        """What the allocator keeps of memory that was freed."""
        self.reuses_blocks = False
        """Whether new memory of a factory is the first freed block of its size, as with torch's allocator."""
        self._freed: dict[int, list[torch.UntypedStorage]] = {}
        self.random = torch.Generator()
        self._allocations: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()
        self._pinned: dict[int, weakref.ref] = {}
        self._reads: list[tuple[tuple[int, int], torch.Tensor, torch.Tensor]] = []
        self._uploads: list[tuple[tuple[int, int], torch.Tensor, torch.Tensor, str]] = []

    @property
    def counts(self) -> Seen:
        """Everything since the start."""
        return self.seen[0]

    @contextmanager
    def watch(self) -> Iterator[Seen]:
        """Counts of what happens inside."""
        self.seen.append(Seen())
        try:
            yield self.seen[-1]
        finally:
            self.seen.pop()

    @property
    def allocated_bytes(self) -> int:
        return sum(allocation.storage.nbytes() for allocation in self._allocations.values())

    def note(self, kind: str, number: int = 1) -> None:
        place = code_place()
        if self.graph is not None and kind in ("synchronise", "wait"):
            raise DeviceError(f"operation not permitted when stream is capturing: the host waits at {place}")
        for seen in self.seen:
            seen[kind] += number
            seen.places[kind][place] += number

    # --- memory ---------------------------------------------------------------------------------------------

    def adopt(self, value: torch.Tensor, requires_grad: bool = False) -> Any:
        """A device tensor over a value; a new allocation if its storage is not known."""
        value = value.detach()
        storage = value.untyped_storage()
        allocation = self._allocations.get(storage._cdata)
        if allocation is None:
            if storage.nbytes():
                self.note("allocate")
            allocation = self._allocations[storage._cdata] = Allocation(storage, code_place())
            if self.reuses_blocks:
                weakref.finalize(allocation, self._freed.setdefault(storage.nbytes(), []).append, storage)
            if self.graph is None:
                allocation.write = self._now()
            else:
                self.graph.own.append(value)
        return EmulatedTensor(value, allocation).requires_grad_(requires_grad)

    def placed(self, made: torch.Tensor) -> torch.Tensor:
        """What a factory made, in a freed block if there is one of its size."""
        blocks = self._freed.get(made.untyped_storage().nbytes(), []) if self.graph is None else []
        if not self.reuses_blocks or not blocks or not made.is_contiguous():
            return made
        blocks.sort(key=lambda storage: storage.data_ptr())
        return torch.empty(0, dtype=made.dtype).set_(blocks.pop(0), 0, made.shape, made.stride()).copy_(made)

    def pin(self, value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        key = storage._cdata
        self._pinned[key] = weakref.ref(storage, lambda _: self._pinned.pop(key, None))
        return value

    def is_pinned(self, value: torch.Tensor) -> bool:
        return value.untyped_storage()._cdata in self._pinned

    # --- copies ---------------------------------------------------------------------------------------------

    def to_device(self, host: torch.Tensor, non_blocking: bool) -> Any:
        result = self.adopt(torch.empty_like(value_of(host).detach()))
        self.upload(result, value_of(host), non_blocking)
        is_parameter = isinstance(host, torch.nn.Parameter)
        return result if is_parameter else result.requires_grad_(host.requires_grad)

    def upload(self, target: EmulatedTensor, host: torch.Tensor, non_blocking: bool) -> None:
        """Copy into existing device memory."""
        self.note("upload")
        pinned = self.is_pinned(host)
        if not (pinned and non_blocking):
            self.note("synchronise")
        self.execute(aten.copy_.default, (target.value, host.detach()), {}, [target], {0})
        if pinned and non_blocking and self.graph is None:
            self._uploads.append((self._now(), host.detach(), host.detach().clone(), code_place()))

    def to_host(self, source: EmulatedTensor, target: Any, non_blocking: bool) -> torch.Tensor:
        self.note("read")
        if target is None:
            target = torch.empty_like(source.value.detach())
            if non_blocking:
                self.pin(target)
        if not non_blocking or not self.is_pinned(target):
            self.note("synchronise")
            self._touch([source], set())
            with torch.no_grad():
                target.copy_(source.value)
            self.wait_quietly()
            return target
        self._touch([source], set())

        def read() -> None:
            snapshot = source.value.detach().clone()
            poison(target)
            self._reads.append((self._now(), target, snapshot))

        if self.graph is not None:
            self.graph.record(read, [source])
        else:
            read()
        return target

    def _now(self) -> tuple[int, int]:
        return self.stream.cuda_stream, self.stream.now

    def wait(self, clock: dict[int, int]) -> None:
        self.note("wait")
        self.deliver(clock)

    def wait_quietly(self) -> None:
        """All of the current stream is done."""
        self.deliver(self.stream.known | {self.stream.cuda_stream: self.stream.now})

    def deliver(self, clock: dict[int, int]) -> None:
        """The host knows that what `clock` covers is done: its reads arrive, its uploads have left."""
        merge(self.host, clock)
        reads, uploads = self._reads, self._uploads
        self._reads, self._uploads = [], []
        for read in reads:
            if self.host.get(read[0][0], 0) >= read[0][1]:
                read[1].copy_(read[2])
            else:
                self._reads.append(read)
        for upload in uploads:
            (stream, number), source, before, place = upload
            if self.host.get(stream, 0) < number:
                self._uploads.append(upload)
            elif not same_bits(source, before):
                raise DeviceError(
                    f"the pinned buffer uploaded at {place} was rewritten before that was waited for"
                )

    # --- operations -----------------------------------------------------------------------------------------

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation of torch on device tensors."""
        flat, spec = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if not any(on_device(x) for x in tensors):
            return func(*tree_map(value_of, args), **tree_map(value_of, kwargs))
        packet = func.overloadpacket
        if packet is aten.copy_ and not on_device(args[1]) and args[1].dim() > 0:
            self.upload(args[0], value_of(args[1]), non_blocking_of(args, kwargs))
            return args[0]
        if packet is aten.copy_ and not on_device(args[0]):
            return self.to_host(args[1], args[0], non_blocking_of(args, kwargs))
        self._check_devices(packet, args, tensors)
        if packet in _WAITING and not (
            packet is aten.repeat_interleave and kwargs.get("output_size") is not None
        ):
            self.note("synchronise")
        kwargs = {k: (CPU if k == "device" and v is not None else v) for k, v in kwargs.items()}
        if any(argument.name == "generator" for argument in func._schema.arguments):
            kwargs.setdefault("generator", self.random)
        flat, spec = tree_flatten((args, kwargs))
        values = [value_of(x) for x in flat]
        inner_args, inner_kwargs = tree_unflatten(values, spec)
        written = {i for i, argument in enumerate(func._schema.arguments) if _is_written(argument)}
        touched, writes = [], set()
        for i, argument in enumerate(args):
            for x in tree_flatten(argument)[0]:
                if on_device(x):
                    writes |= {len(touched)} if i in written else set()
                    touched.append(x)
        names = {a.name for a in func._schema.arguments if _is_written(a)}
        for name, x in kwargs.items():
            if on_device(x):
                writes |= {len(touched)} if name in names else set()
                touched.append(x)
        result = self.execute(func, inner_args, inner_kwargs, touched, writes)
        wrappers = {id(x.value): x for x in flat if isinstance(x, EmulatedTensor)}
        known = {v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)}
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        fresh = any(x.untyped_storage()._cdata not in known for x in outputs)
        if (fresh or written) and packet not in _NO_KERNEL:
            self.note("launch")
        if packet in _NO_KERNEL and packet is not aten.detach:
            for x in outputs:
                poison(x)

        def wrap(x: Any) -> Any:
            return wrappers.get(id(x)) if id(x) in wrappers else self.adopt(x)

        return tree_map(lambda x: wrap(x) if isinstance(x, torch.Tensor) else x, result)

    def _check_devices(self, packet: Any, args: Any, tensors: list[torch.Tensor]) -> None:
        strangers = [x for x in tensors if not on_device(x) and x.dim() > 0]
        if packet in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_, aten._unsafe_index):
            indices = [x for x in args[1] if x is not None]
            strangers = [x for x in strangers if not any(x is index for index in indices)]
            for index in indices:
                if not on_device(index):
                    self.note("upload")
                    self.note("synchronise")
                one_number = packet is not aten.index and args[2].numel() == 1 and len(indices) == 1
                if index.dtype in (torch.bool, torch.uint8) and not one_number:
                    self.note("synchronise")
        if strangers:
            raise DeviceError(
                f"expected all tensors to be on the same device, but {packet} got one of shape "
                f"{tuple(strangers[0].shape)} on the CPU beside cuda:0"
            )

    def launch(self, kernel: Any, run: Callable, args: Any, grid: Any, kwargs: Any) -> Any:
        """One Triton kernel, in the interpreter."""
        flat, spec = tree_flatten((args, kwargs))
        for x in flat:
            if isinstance(x, torch.Tensor) and not on_device(x):
                raise DeviceError(
                    f"{kernel.__name__}: pointer argument cannot be accessed from Triton (cpu tensor?)"
                )
        inner_args, inner_kwargs = tree_unflatten([value_of(x) for x in flat], spec)
        self.note("launch")
        self.note("triton")
        for seen in self.seen:
            seen.kernels[kernel.__name__] += 1
        touched = [x for x in flat if on_device(x)]
        several = self.stream != self.default_stream or any(
            x.allocation.write[0] != self.stream.cuda_stream for x in touched
        )
        before = [x.value.clone() for x in touched] if several else []

        def interpret(*args: Any, **kwargs: Any) -> None:
            with torch._C.DisableTorchFunction():
                run(kernel, *args, grid=grid, warmup=False, **kwargs)

        # Which arguments a kernel writes is not declared; where it matters, look.
        self.execute(
            interpret, inner_args, inner_kwargs, touched, set(range(len(touched))) if not several else set()
        )
        changed = {
            i for i, (x, old) in enumerate(zip(touched, before, strict=False)) if not same_bits(x.value, old)
        }
        self._touch([touched[i] for i in sorted(changed)], set(range(len(changed))))

    def execute(self, func: Any, args: Any, kwargs: Any, touched: list, writes: set[int]) -> Any:
        self.stream.now += 1
        self._touch(touched, writes)
        if self.graph is not None:
            self.graph.before(touched)
        with torch.no_grad():
            result = func(*args, **kwargs)
        if self.graph is not None:
            self.graph.record_call(func, args, kwargs, result, touched)
        return result

    def stamp(self, allocations: list[Allocation | None]) -> None:
        """A replayed graph used all these."""
        self.stream.now += 1
        for allocation in allocations:
            if allocation is not None:
                allocation.write, allocation.reads = self._now(), {}

    def allocation_of(self, value: torch.Tensor) -> Allocation | None:
        return self.allocation_at(value.untyped_storage()._cdata)

    def allocation_at(self, storage: int) -> Allocation | None:
        return self._allocations.get(storage)

    def _touch(self, tensors: list, writes: set[int]) -> None:
        """Check the order between streams, and note who touched what."""
        if self.graph is not None:
            return  # nothing runs now
        stream, now = self._now()
        for i, tensor in enumerate(tensors):
            allocation = tensor.allocation
            earlier = list(allocation.reads.items()) if i in writes else []
            earlier += [allocation.write] if allocation.write else []
            for other, number in earlier:
                seen = max(self.stream.known.get(other, 0), self.host.get(other, 0))
                if other != stream and seen < number:
                    does = "writes" if i in writes else "reads"
                    raise DeviceError(
                        f"stream {stream} at {code_place()} {does} what stream {other} touched last, "
                        "and was not told to wait for it"
                    )
            if i in writes:
                allocation.write, allocation.reads = (stream, now), {}
            else:
                allocation.reads[stream] = now


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
