"""The process mesh: the only module that touches torch.distributed's set-up and Megatron's parallel state."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from sip_engine.distributed.megatron_cpu import megatron_device
from sip_engine.utils.errors import AloneError, ConfigError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

T = TypeVar("T")

DEFAULT_TIMEOUT_MINUTES = 120


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: this rank's coordinate, the axis' size and the process group along it."""

    rank: int
    size: int
    group: dist.ProcessGroup = field(repr=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def global_rank(self, rank: int) -> int:
        """The world rank of the process with coordinate `rank` on this axis."""
        return dist.get_global_rank(self.group, rank)

    def stack(self, part: torch.Tensor) -> torch.Tensor:
        """A tensor [...] of one shape on every process of the axis -> [size, ...], in rank order."""
        if self.size == 1:
            return part[None]
        stacked = part.new_empty((self.size, *part.shape))
        dist.all_gather(list(stacked.unbind(0)), part.contiguous(), group=self.group)
        return stacked


@dataclass(frozen=True)
class Mesh:
    """Where this process stands: tensor, pipeline and data axes, and the replica (tensor × pipeline).

    Every process of one replica holds a part of the same model copy and works on the same prefixes.
    """

    rank: int
    size: int
    device: torch.device
    tp: Axis
    pp: Axis
    dp: Axis
    replica: Axis
    ends: Axis | None
    """First and last pipeline stage; None on stages between them and without pipeline parallelism."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True on every process of the world if it is on one."""
        if self.size == 1:
            return flag
        # In host memory, over gloo: a process may come late for as long as host work takes.
        seen = torch.tensor([flag], dtype=torch.int32, device="cpu")
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen.item())

    def least_in_replica(self, value: int) -> int:
        """The smallest of a number over the processes of a replica; over gloo."""
        if self.replica.size == 1:
            return value
        least = torch.tensor([value], dtype=torch.int64, device="cpu")
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.replica.group)
        return int(least.item())

    def table(self, values: Sequence[float]) -> list[list[float]]:
        """Every process' row of numbers (float64; as many on each), in rank order, on every process of the world."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(list(values), dtype=torch.float64, device="cpu")  # over gloo, as in `any`
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows).tolist()

    def any_in_replica(self, flag: bool) -> bool:
        """True on every process of a replica if it is on one."""
        if self.replica.size == 1:
            return flag
        seen = torch.tensor([flag], dtype=torch.int32, device="cpu")
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self.replica.group)
        return bool(seen.item())

    def broadcast(self, value: T | None) -> T:
        """Give every process of the world the first one's object."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process' object, in rank order, on every process of the world."""
        if self.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    def from_replica_leader(self, value: T | None) -> T:
        """Give every process of a replica its first process' object."""
        if self.replica.size == 1:
            return value  # type: ignore[return-value]
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=self.replica.global_rank(0), group=self.replica.group)
        return box[0]

    def from_last_stage(self, value: T | None) -> T:
        """Give every pipeline stage the last stage's object."""
        if self.pp.size == 1:
            return value  # type: ignore[return-value]
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=self.pp.global_rank(self.pp.size - 1), group=self.pp.group)
        return box[0]

    def gather_replicas(self, value: T) -> list[T]:
        """Every data-parallel rank's object, in rank order, on every process."""
        boxes: list[Any] = [None] * self.dp.size
        dist.all_gather_object(boxes, value, group=self.dp.group)
        return boxes

    def replicas_to_main(self, value: T) -> list[T] | None:
        """Every data-parallel rank's object, in rank order, on the first process of the world; None on the others."""
        if not self.replica.is_first:
            return None
        if self.dp.size == 1:
            return [value]
        boxes: list[Any] | None = [None] * self.dp.size if self.is_main else None
        dist.gather_object(value, boxes, dst=self.dp.global_rank(0), group=self.dp.group)
        return boxes

    def gather_stages(self, value: T) -> list[T]:
        """Every pipeline stage's object, in stage order: that of its process with this one's tensor-parallel rank."""
        if self.pp.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.pp.size
        dist.all_gather_object(boxes, value, group=self.pp.group)
        return boxes

    def without_pipeline(self) -> Mesh:
        """The same processes for a model that every pipeline stage holds whole: the stages become data parallel.

        To be called by every process of the world, for it makes a process group, which lasts until `stop_mesh`.
        """
        from megatron.core import parallel_state as state

        if self.pp.size == 1:
            return self
        shards: list[Any] = [None] * self.size
        dist.all_gather_object(shards, self.tp.rank)
        copies = [[rank for rank, shard in enumerate(shards) if shard == tp] for tp in range(self.tp.size)]
        # Contexts are never split: Megatron's group for that is this process alone.
        alone = state.get_context_parallel_group()
        return replace(
            self,
            pp=_axis(alone),
            dp=_axis(dist.new_subgroups_by_enumeration(copies)[0]),
            replica=self.tp,
            ends=None,
        )

    def megatron_groups(self) -> ProcessGroupCollection:
        """What a model over this mesh needs to know, so that Megatron does not ask its own global state for it."""
        from megatron.core import parallel_state as state
        from megatron.core.process_groups_config import ProcessGroupCollection

        return ProcessGroupCollection(
            tp=self.tp.group,
            pp=self.pp.group,
            cp=state.get_context_parallel_group(),
            dp_cp=self.dp.group,
            embd=self.ends.group if self.ends else None,
        )

    def barrier(self) -> None:
        """Wait for every process of the world, over gloo: `dist.barrier` would occupy the devices."""
        self.any(False)


def join_processes(timeout_minutes: int = DEFAULT_TIMEOUT_MINUTES, *, start_s: float = 0.0) -> None:
    """Join the process group: `torchrun`'s, or a world of one. A second call does nothing.

    Args:
        timeout_minutes: How long a collective may wait for the other processes.
        start_s: Seconds to wait for all processes to come; 0 is `timeout_minutes`.

    Raises:
        ConfigError: the processes did not find each other.
    """
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" not in os.environ:
        _join_alone(timeout)
        return
    backend, device = _backend()
    patience = timedelta(seconds=start_s) if start_s else timeout
    try:
        store, rank, size = next(rendezvous("env://", timeout=patience))
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device
        )
    except (ValueError, RuntimeError) as error:  # torch has many types for one cause
        raise ConfigError(
            f"the processes did not find each other ({str(error).splitlines()[0][:200]}): start them with torchrun, "
            "or set MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK for all; without any of these one runs alone"
        ) from None


def control_store() -> Any:
    """A connection of its own to the store that the processes met in, for a thread; None before they have met."""
    if not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store()  # torch has no public name for it
    return PrefixStore("sip", store.clone())  # pyright: ignore[reportAttributeAccessIssue]


def start_mesh(
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    *,
    seed: int = 0,
    timeout_minutes: int = DEFAULT_TIMEOUT_MINUTES,
) -> Mesh:
    """Join the process group, where `join_processes` has not yet, and lay the axes over it.

    Device tensors travel by nccl where there is CUDA; host tensors and Python objects by gloo everywhere, so that
    waiting for a process with long work on its host is no matter of the devices. A process that is not heard of for
    `timeout_minutes` ends the others. A second call returns a mesh over the same groups and refuses another layout.

    Raises:
        ConfigError: the number of processes is not a multiple of tensor × pipeline parallelism.
    """
    from megatron.core import parallel_state
    from megatron.core import tensor_parallel as megatron_tp

    join_processes(timeout_minutes)
    size = dist.get_world_size()
    if size % (tensor_parallel * pipeline_parallel):
        raise ConfigError(
            f"{size} processes cannot hold tensor_parallel={tensor_parallel} x "
            f"pipeline_parallel={pipeline_parallel}: start a multiple of "
            f"{tensor_parallel * pipeline_parallel} processes with torchrun --nproc-per-node"
        )
    with megatron_device():
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_parallel, pipeline_parallel, distributed_timeout_minutes=timeout_minutes
            )
            megatron_tp.model_parallel_cuda_manual_seed(seed)
    mesh = _current_mesh()
    if (mesh.tp.size, mesh.pp.size) != (tensor_parallel, pipeline_parallel):
        raise ConfigError(
            f"this process already runs with tensor x pipeline = {mesh.tp.size} x {mesh.pp.size}; "
            f"{tensor_parallel} x {pipeline_parallel} needs a process of its own"
        )
    return mesh


def start_alone(*, seed: int = 0) -> Mesh:
    """`start_mesh` of a command that is one process, whatever a launcher has left in its environment.

    Raises:
        AloneError: the environment tells of several processes, which would all do the same.
    """
    if not dist.is_initialized():
        foreign = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
        if foreign.get("WORLD_SIZE", "1") not in ("", "1"):
            found = ", ".join(f"{name}={value}" for name, value in foreign.items())
            raise AloneError(
                f"{found} in the environment tells of several processes, and this command is one: start it without "
                f"torchrun, or unset {' '.join(foreign)}"
            )
        _join_alone(timedelta(minutes=DEFAULT_TIMEOUT_MINUTES))
    return start_mesh(seed=seed)


def stop_mesh() -> None:
    """Leave the process group; a later `start_mesh` may lay another mesh."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _join_alone(timeout: timedelta) -> None:
    """A world of one meets itself in memory: no port to collide with another run's, no file to leave.

    Raises:
        ConfigError: there is no network interface at all, not even the loopback one, which gloo asks for.
    """
    backend, device = _backend()
    try:
        dist.init_process_group(
            backend, store=HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device
        )
    except RuntimeError as error:
        if "interface" not in str(error):
            raise
        raise ConfigError(
            "no network interface is up here, not even the loopback one: bring it up (ip link set lo up), "
            "or name one in GLOO_SOCKET_IFNAME"
        ) from None


def _backend() -> tuple[str, torch.device | None]:
    """How tensors travel, and this process' GPU if it has one, which becomes the current one."""
    if not torch.cuda.is_available():
        return "gloo", None
    number = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(number)
    return "cpu:gloo,cuda:nccl", torch.device("cuda", number)


def _current_mesh() -> Mesh:
    from megatron.core import parallel_state as state

    cuda = torch.cuda.is_available()
    # Megatron ties the embeddings of the first and the last stage in a group of these two.
    ends: Any = state.get_embedding_group(check_initialized=False)
    return Mesh(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        tp=_axis(state.get_tensor_model_parallel_group()),
        pp=_axis(state.get_pipeline_model_parallel_group()),
        dp=_axis(state.get_data_parallel_group()),
        replica=_axis(state.get_model_parallel_group()),
        ends=_axis(ends) if ends is not None and dist.get_world_size(ends) == 2 else None,
    )


def _axis(group: Any) -> Axis:
    return Axis(dist.get_rank(group), dist.get_world_size(group), group)
