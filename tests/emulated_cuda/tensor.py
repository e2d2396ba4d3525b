"""Device tensors, and the calls of torch that make and move them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from emulated_cuda.streams import CPU, CUDA, Allocation, current, is_cuda, poison

_PARSE_TO: Any = torch._C._nn._parse_to  # pyright: ignore[reportAttributeAccessIssue]
_SET_DATA: Any = torch.Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]
_TYPE_NAMES = {
    torch.float32: "FloatTensor", torch.float16: "HalfTensor", torch.bfloat16: "BFloat16Tensor",
    torch.float64: "DoubleTensor", torch.int64: "LongTensor", torch.int32: "IntTensor", torch.uint8: "ByteTensor",
}  # fmt: skip


class EmulatedTensor(torch.Tensor):
    """A device tensor. Without an allocation it stands for a parameter that was moved to the host."""

    value: torch.Tensor
    allocation: Allocation | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type, value: torch.Tensor, allocation: Allocation | None) -> EmulatedTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype, device=CPU
        )
        self.value, self.allocation = value, allocation
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return current().run(func, args, kwargs or {})

    is_cuda = property(lambda self: self.allocation is not None)  # type: ignore[assignment]
    is_cpu = property(lambda self: self.allocation is None)  # type: ignore[assignment]
    device = property(lambda self: CPU if self.allocation is None else CUDA)  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        wrapped = new if isinstance(new, EmulatedTensor) else EmulatedTensor(new, None)
        _SET_DATA(self, wrapped)
        self.value, self.allocation = wrapped.value, wrapped.allocation

    def get_device(self) -> int:
        return -1 if self.allocation is None else 0

    def type(self, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return f"torch.{'cuda.' if self.is_cuda else ''}{_TYPE_NAMES[self.dtype]}"
        assert isinstance(dtype, torch.dtype)
        return self.to(dtype)

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.value.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        if self.allocation is None:
            return self.value.numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return current().to_host(self, None, False)

    def cuda(self, *_: Any, non_blocking: bool = False, **__: Any) -> torch.Tensor:
        return self.to(CUDA, non_blocking=non_blocking)

    def to(self, *args: Any, non_blocking: bool = False, copy: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        device, dtype = _target(args, kwargs)
        if device is None or is_cuda(device) == self.is_cuda:
            same = dtype is None or dtype == self.dtype
            if same and not copy:
                return self
            return self.clone() if same else torch.ops.aten._to_copy(self, dtype=dtype)
        if is_cuda(device):
            return current().to_device(self.value if dtype is None else self.value.to(dtype), non_blocking)
        host = current().to_host(self, None, non_blocking)
        return host if dtype is None else host.to(dtype)

    def pin_memory(self, *_: Any) -> torch.Tensor:
        assert self.allocation is None, (
            "cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned"
        )
        return current().pin(self.value.clone())

    def is_pinned(self, *_: Any) -> bool:
        return self.allocation is None and current().is_pinned(self.value)

    def record_stream(self, stream: Any) -> None:
        pass  # values live as long as they are referred to

    def __repr__(self, **_: Any) -> str:
        return f"emulated {self.device} {self.value!r}"

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        for name, value in vars(self).items():
            if name not in ("value", "allocation"):
                setattr(copied, name, value)
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, proto: Any) -> Any:
        """Saved with its values, and loaded to the host, as with `map_location="cpu"`."""
        current().note("synchronise")
        return self.value.detach().__reduce_ex__(proto)


def _target(args: Any, kwargs: Any) -> tuple[Any, torch.dtype | None]:
    """Device and dtype asked for by the arguments of `Tensor.to`."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    if isinstance(kwargs.get("other"), torch.Tensor):
        args = (kwargs["other"], *args)
    for arg in args:
        if isinstance(arg, torch.Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (str, torch.device)) or (isinstance(arg, int) and not isinstance(arg, bool)):
            device = arg
    return device, dtype


class CallsOfTorch(TorchFunctionMode):
    """What is asked for by name: factories on the device, moves to it, pinned memory."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = dict(kwargs or {}), current()
        if func is _PARSE_TO:
            return func(*args, **kwargs)
        if func == _SET_DATA and on_device(args[1]) and not isinstance(args[0], EmulatedTensor):
            return _become_emulated(*args)
        if func is torch.Tensor.cuda:
            return args[0].cuda() if on_device(args[0]) else device.to_device(args[0], False)
        if func is torch.Tensor.to and not isinstance(args[0], EmulatedTensor):
            target, dtype = _target(args[1:], kwargs)
            if is_cuda(target):
                host = args[0] if dtype is None else args[0].to(dtype)
                return device.to_device(host, kwargs.get("non_blocking", False))
        if func is torch.Tensor.pin_memory and not on_device(args[0]):
            return device.pin(args[0].clone())
        if func is torch.Tensor.is_pinned and not on_device(args[0]):
            return device.is_pinned(args[0])
        if kwargs.pop("pin_memory", False):
            return device.pin(func(*args, **kwargs | {"device": "cpu"}))
        if func is torch.Tensor.copy_ and not on_device(args[0]) and on_device(args[1]):
            return device.to_host(args[1], args[0], non_blocking_of(args, kwargs))
        if func is torch.tensor and isinstance(args[0], (list, tuple)):
            data = tree_map(lambda x: x.item() if on_device(x) else x, args[0])  # as torch does, one by one
            args = (data, *args[1:])
        target = kwargs.get("device")
        if target is None:
            return func(*args, **kwargs)
        given = [x for x in tree_flatten((args, kwargs))[0] if on_device(x)]
        if not is_cuda(target):
            if func in (torch.tensor, torch.as_tensor, torch.asarray) and given:
                return device.to_host(given[0], None, False)
            return func(*tree_map(value_of, args), **tree_map(value_of, kwargs))
        kwargs["device"] = "cpu"
        if given:  # torch.zeros_like(x, device=...): the result follows x
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            return device.to_device(func(*args, **kwargs), False)
        if func in (torch.empty, torch.empty_like, torch.empty_strided):
            made = func(*args, **kwargs)
            poison(made)
        else:
            made = device.execute(func, args, kwargs, [], set())
            if not isinstance(made, torch.Tensor):
                return made
            device.note("launch")
        return device.adopt(device.placed(made), requires_grad=bool(kwargs.get("requires_grad")))


def _become_emulated(tensor: torch.Tensor, new: EmulatedTensor) -> None:
    """`tensor.data = new`, of a CPU tensor (a parameter that moves to the device): it stays the same object."""
    other: Any = new.detach().requires_grad_(tensor.requires_grad)
    for name, value in vars(tensor).items():
        setattr(other, name, value)
    if isinstance(tensor, torch.nn.Parameter):
        other._is_param = True
    torch.utils.swap_tensors(tensor, other)


def on_device(x: object) -> bool:
    return isinstance(x, EmulatedTensor) and x.allocation is not None


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, EmulatedTensor) else x


def non_blocking_of(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
