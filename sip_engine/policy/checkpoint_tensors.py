"""A checkpoint's tensors: Megatron plans who writes what, threads of our own write it, and reading trusts nobody.

Megatron-core's `dist_checkpointing` loads at any tensor x pipeline x data layout. Its own writer forks processes that
nobody watches; here each process writes its files itself, in a thread where the training is to go on meanwhile.
Its index is a pickle: only the few classes of which an index consists are admitted.
"""

from __future__ import annotations

import enum
import inspect
import io
import logging
import pickle
import pickletools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common as megatron_common
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    SerializationFormat,
    _StorageInfo,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from sip_engine.distributed.megatron_cpu import megatron_device
from sip_engine.policy.checkpoint_files import FileEntry
from sip_engine.utils.errors import CheckpointError
from sip_engine.utils.files import sync
from sip_engine.utils.regular import open_regular, read_bytes

_ADMITTED: dict[str, frozenset[str]] = {
    "torch": frozenset(
        {"Size", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "uint8"}
        | {"int8", "int16", "int32", "int64", "bool"}
    ),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {"BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"}
        | {"TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"}
    ),
    "torch.distributed.checkpoint.planner": frozenset(
        {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
}
"""Classes and constants of which an index consists, by module (torch 2.11 to 2.13)."""
_PLANNED_HERE: dict[str, Any] = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)
"""Megatron-core from 0.17 on would leave an asynchronous save to another package, which starts processes."""


_NUMBERED = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_REFUSED = frozenset(
    {"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
)
"""Operations of pickles that take memory before it is needed, or go to tables outside of the file."""


class HostCopies:
    """Tensors copied to memory of the host, into the same buffers each time: there is one copy at most.

    The buffers are pinned beside CUDA.
    """

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}

    def take(self, key: Any, tensor: Tensor) -> Tensor:
        """A copy of `tensor` [...] on the host; later changes do not reach it once `wait` has returned."""
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = tensor.new_empty(tensor.shape, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)

    @property
    def num_bytes(self) -> int:
        """Memory of the host that the copy takes, for as long as the run goes on."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def wait(self) -> None:
        """Wait until all copies are whole."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class TensorSave:
    """A save of sharded tensors: planned on all processes, written by each, finished on all.

    Made and finished by every process at the same time; `write` is this process' own business, in any thread.
    """

    def __init__(self, tensors: dict[str, Any], folder: Path, copies: HostCopies | None) -> None:
        """Plan it, writing nothing. With `copies`, the tensors may change as soon as this returns."""
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._small: dict[str, bytes] = {}
        self.written: dict[str, FileEntry] = {}
        """What this process wrote, by its name in the folder."""

        def split(*arguments: Any) -> tuple[Any, dict[str, Any]]:
            sharded, common = save_preprocess(*arguments)
            # Now, not later: it holds numbers that the optimizer counts up in place.
            if dist.get_rank() == 0:
                self._small[COMMON_STATE_FNAME] = _pickled(common)
            return sharded, {}

        save_preprocess = serialization.save_preprocess
        ours = mock.patch.object(serialization, "save_preprocess", split)
        with megatron_device(), quiet_checkpoints(), _results_in_process(), ours, _no_common_file():
            request: Any = dist_checkpointing.save(
                tensors, str(folder), async_sharded_save=True, **_PLANNED_HERE
            )
        self._finalize = request.finalize_fns
        self._transforms: Any = None
        self._buckets, self._results = [], None
        if request.async_fn is not None:
            _, buckets, self._results = request.async_fn_args
            (self._transforms,) = request.async_fn.args[0]
            for path, name, (objects, parts) in buckets:
                on_host = [(item, _on_host(item, tensor, copies)) for item, tensor in parts]
                self._buckets.append((path, name, objects, on_host))
        if copies is not None:
            copies.wait()

    def write(self) -> None:
        """Write and sync this process' files, and hash them. Raises what writing raises."""
        results = {}
        for name, content in self._small.items():
            with open_regular(self._folder / name, "wb") as file:
                file.write(content)
            self._close(name)
        for number, (path, name, objects, tensors) in enumerate(self._buckets):
            with open_regular(path, "wb") as file:
                results[number] = [
                    _write_item(self._transforms, file, data, item, name, SerializationFormat.TORCH_SAVE)
                    for item, data in [*objects, *tensors]
                ]
            self._close(name)
        self._buckets = []
        if self._results is not None:
            self._results.put(results)

    def start(self) -> None:
        """`write` in a thread."""
        self._thread = threading.Thread(target=self._write_kept, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Have it written: by the thread, if there is one, else now. Raises what writing raises."""
        if self._thread is None:
            self.write()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Write the index, on the first process; all must have written their files. Every process calls it.

        Raises:
            OSError: on the first process, when the others are done with it as well.
        """
        errors: list[OSError] = []
        finish, save_config = FileSystemWriterAsync.finish, serialization.save_config
        with (
            megatron_device(),
            quiet_checkpoints(),
            mock.patch.object(FileSystemWriterAsync, "finish", _keeping_errors(finish, errors)),
            mock.patch.object(serialization, "save_config", _keeping_errors(save_config, errors)),
        ):
            for finalize in self._finalize:
                finalize()
        if errors:
            raise errors[0]

    def _close(self, name: str) -> None:
        sync(self._folder / name)
        self.written[name] = FileEntry.of(self._folder / name)

    def _write_kept(self) -> None:
        try:
            self.write()
        except Exception as error:  # it is raised where the training waits for the save
            self._error = error


def load_tensors(path: Path, wanted: dict[str, Any], files: set[str]) -> dict[str, Any]:
    """What `wanted` asks for, from a checkpoint's `sharded` folder; `files` are the names its manifest lists there.

    Raises:
        CheckpointError: unreadable, of other shapes, or its index holds what an index does not.
    """

    def reader(folder: str, *_: Any, **__: Any) -> FileSystemReader:
        return _CheckedReader(folder, files)

    refused = mock.patch.object(megatron_torch.MCoreLoadPlanner, "load_bytes", _refuse_bytes)
    try:
        with (
            megatron_device(),
            quiet_checkpoints(),
            refused,
            mock.patch.object(megatron_torch, "_get_filesystem_reader", reader),
        ):
            return dist_checkpointing.load(wanted, str(path), strict=StrictHandling.RAISE_UNEXPECTED)  # type: ignore
    except (Exception, CheckpointException) as error:  # many types for one cause: an unreadable file
        raise _not_loaded(path, cause_of(error)) from error


def dtype_in_index(path: Path, files: set[str], name: str) -> torch.dtype:
    """The type of the tensor `name` of a checkpoint's `sharded` folder, as its index has it.

    Raises:
        CheckpointError: the index cannot be read, or holds no such tensor.
    """
    try:
        found = _CheckedReader(str(path), files).read_metadata().state_dict_metadata[name]
        dtype = getattr(getattr(found, "properties", None), "dtype", None)
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{name} has no type")
    except Exception as error:  # a damaged pickle raises many types
        raise _not_loaded(path, error) from error
    return dtype


def _not_loaded(path: Path, error: BaseException) -> CheckpointError:
    reason = f"{type(error).__name__}: {error}".split("\n")[0]
    return CheckpointError(f"{path.parent}: cannot be loaded ({reason})")


def cause_of(error: BaseException) -> BaseException:
    """The first error of those that torch wraps in one of its own, which is no `Exception`."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return next(iter(failures.values()))[0] if failures else error


class quiet_checkpoints:
    """Megatron logs every save at warning level; a progress bar and our own records say enough."""

    def __enter__(self) -> None:
        self._level = logging.getLogger("megatron.core").level
        logging.getLogger("megatron.core").setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("megatron.core").setLevel(self._level)


def _enum_member(kind: object, name: object) -> enum.Enum:
    """What an index may ask of `getattr`: Python 3.11.0 to 3.11.3 write a member of an enumeration by its name."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(name, str):
        member = kind.__members__.get(name)
        if member is not None:
            return member
    raise pickle.UnpicklingError(f"the index asks for {name} of {kind}, which no index needs")


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("builtins", "getattr"):
            return _enum_member
        if global_name in _ADMITTED.get(module_name, ()):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"the index asks for {module_name}.{global_name}, which no index needs")


def _read_index(content: bytes) -> Any:
    """What an index says; refused where it asks for a class that none has, or for memory as it likes."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in _NUMBERED and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError(
                f"the index asks for place {argument} of a memory that has no such place"
            )
        if operation.name in _REFUSED:
            raise pickle.UnpicklingError(f"the index holds {operation.name}, which no index needs")
    return _IndexUnpickler(io.BytesIO(content)).load()


class _CheckedReader(FileSystemReader):
    """Reads an index by the unpickler above, and follows it to files of the manifest only."""

    def __init__(self, path: str, files: set[str]) -> None:
        super().__init__(path)
        self._files = files
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = self._checked(_read_index(read_bytes(Path(self.path) / ".metadata")))
        return self._index

    def _checked(self, index: Any) -> Metadata:
        if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
            raise pickle.UnpicklingError("the index is none")
        places = index.storage_data if isinstance(index.storage_data, dict) else {None: None}
        for place in places.values():
            if not isinstance(place, _StorageInfo) or place.relative_path not in self._files:
                raise pickle.UnpicklingError("the index points to a file that is not the checkpoint's")
            if place.transform_descriptors:
                raise pickle.UnpicklingError("the index asks for a transformation of files")
        for name, stored in index.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and not isinstance(stored.chunks, list):
                raise pickle.UnpicklingError(f"the index has no list of chunks for {name}")
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index


@contextmanager
def _no_common_file() -> Iterator[None]:
    """Megatron-core up to 0.16 writes what is no tensor at once and by itself; later ones put it in the index."""
    strategy = getattr(megatron_common, "TorchCommonSaveStrategy", None)
    if strategy is None:
        yield
        return
    with mock.patch.object(strategy, "save_common", lambda *_: None):
        yield


def _refuse_bytes(*_: object) -> None:
    raise pickle.UnpicklingError("the index has an object in the place of a tensor")


def _on_host(item: Any, tensor: Tensor, copies: HostCopies | None) -> Tensor:
    return copies.take((item.index.fqn, item.index.offset), tensor) if copies else tensor.to("cpu")


def _pickled(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _keeping_errors(action: Callable[..., None], errors: list[OSError]) -> Callable[..., None]:
    """Collective calls go on after it: where it raised, the other processes would wait for ever."""

    def kept(*arguments: Any, **named: Any) -> None:
        try:
            action(*arguments, **named)
        except OSError as error:
            errors.append(error)

    return kept


@contextmanager
def _results_in_process() -> Iterator[None]:
    """Megatron passes on what it wrote through a process of its own, which threads do not need.

    Starting that process takes seconds, since it imports torch and the program's main module.
    """
    before = filesystem_async._results_queue
    filesystem_async._results_queue = Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before
