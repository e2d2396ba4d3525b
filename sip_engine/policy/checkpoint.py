"""Checkpoints: Megatron's sharded weights and optimizer, the run's state, and a manifest with hashes.

    step_00000100/
        sharded/          Megatron-core dist_checkpointing: loads at any tensor x pipeline x data layout
        state.json        step, data position, settings, vocabulary
        tokenizer.model
        manifest.json     size and sha256 of every file above; written last

Every process writes, syncs and hashes its own tensors; the first one adds the rest and gives the folder its name, so
that a folder with that name is complete. Nothing in it is trusted when it is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from sip_engine.config.model import ModelConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.megatron_cpu import megatron_device
from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.adam_state import load_optimizer
from sip_engine.policy.checkpoint_files import (
    MANIFEST,
    FileEntry,
    commit,
    latest_checkpoint,
    prune,
    read_manifest,
    resolve_checkpoint,
    step_folder,
    temporary_folder,
    write_manifest,
)
from sip_engine.policy.checkpoint_state import (
    CheckpointState,
    StateFile,
    read_state,
    read_state_file,
    state_of,
    write_state,
)
from sip_engine.policy.checkpoint_tensors import (
    HostCopies,
    TensorSave,
    cause_of,
    dtype_in_index,
    load_tensors,
)
from sip_engine.policy.model import PolicyModel
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.utils.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "CheckpointState",
    "CheckpointWriter",
    "checkpoint_tokenizer",
    "latest_checkpoint",
    "load_checkpoint",
    "load_weights",
    "model_of",
    "read_state",
    "resolve_checkpoint",
    "save_checkpoint",
    "sharded_model",
    "stored_dtype",
]

_EXTRA_STATE = "_extra_state"
_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class _Save:
    """One that has begun: where it is to be, its tensors, and what else the first process is to write."""

    final: Path
    tensors: TensorSave
    write_rest: Callable[[Path], None]

    @property
    def temporary(self) -> Path:
        return temporary_folder(self.final)


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; every process calls every method at the same moment.

    With `asynchronous`, `save` returns when the tensors are copied to the host; the checkpoint comes to be in the
    first `poll` after all processes have written, in the next `save`, or in `finish`.
    """

    def __init__(
        self, folder: Path, mesh: Mesh, *, keep: int, keep_every: int = 0, asynchronous: bool = False
    ) -> None:
        self._folder, self._mesh = folder, mesh
        self._keep, self._keep_every = keep, keep_every
        self._copies = HostCopies() if asynchronous else None
        self._begun: _Save | None = None

    @property
    def host_bytes(self) -> int:
        """Memory of the host that this process keeps for its copy of the tensors."""
        return self._copies.num_bytes if self._copies is not None else 0

    def save(
        self, policy: Policy, reference: Reference | None, state: CheckpointState, tokenizer: Tokenizer
    ) -> Path:
        """Write `folder/step_N`; then remove older ones as far as they are not to be kept.

        Raises:
            CheckpointError: on every process; it cannot be written. Earlier checkpoints are as they were.
        """
        self.finish()
        final = step_folder(self._folder, state.step)
        average = reference.average if reference is not None else None

        def write_rest(folder: Path) -> None:
            tokenizer.save(folder / "tokenizer.model")
            write_state(
                folder,
                state,
                has_reference=reference is not None,
                has_average=average is not None,
                distributed_optimizer=policy.has_distributed_optimizer,
                dtype=_dtype_of(policy),
            )

        temporary = temporary_folder(final)
        self._together(final, lambda: _make_anew(temporary) if self._mesh.is_main else None)
        tensors = TensorSave(_sharded(policy, reference, loading=False), temporary / "sharded", self._copies)
        self._begun = _Save(final, tensors, write_rest)
        if self._copies is None:
            self.finish()
        else:
            tensors.start()
        return final

    def poll(self) -> None:
        """Commit a save that is written on every process, if there is one. Raises CheckpointError as `save` does."""
        if self._begun is not None and not self._mesh.any(self._begun.tensors.is_writing):
            self.finish()

    def finish(self) -> None:
        """Wait for the save that has begun, if there is one, and commit it. Raises CheckpointError as `save` does."""
        if self._begun is None:
            return
        begun, self._begun = self._begun, None
        self._together(begun.final, begun.tensors.wait)
        self._together(begun.final, begun.tensors.finish)
        hashed = {
            f"sharded/{name}": entry
            for written in self._mesh.gather(begun.tensors.written)
            for name, entry in written.items()
        }
        self._together(begun.final, lambda: self._commit(begun, hashed) if self._mesh.is_main else None)

    def _commit(self, begun: _Save, hashed: dict[str, FileEntry]) -> None:
        begun.write_rest(begun.temporary)
        write_manifest(begun.temporary, hashed)
        commit(begun.temporary, begun.final)
        prune(self._folder, keep=self._keep, keep_every=self._keep_every)

    def _together(self, final: Path, action: Callable[[], None]) -> None:
        """Do this process' part; where it fails on one process, all give the save up."""
        failed: BaseException | None = None
        try:
            action()
        except (Exception, CheckpointException) as error:  # torch wraps a full disk in errors of its own
            failed = cause_of(error)
        reasons = [reason for reason in self._mesh.gather(failed and _reason(failed)) if reason]
        if not reasons:
            return
        if self._mesh.is_main:
            shutil.rmtree(temporary_folder(final), ignore_errors=True)
        self._mesh.barrier()
        raise CheckpointError(
            f"{final}: cannot be saved ({reasons[0]}); free space there, or keep fewer (checkpoint.keep); the run "
            "goes on from the checkpoint before"
        ) from failed


def save_checkpoint(
    folder: Path,
    policy: Policy,
    reference: Reference | None,
    state: CheckpointState,
    tokenizer: Tokenizer,
    *,
    keep: int,
) -> Path:
    """Write `folder/step_N` and remove all but the newest `keep`. Called by every process.

    Raises:
        CheckpointError: it cannot be written.
    """
    return CheckpointWriter(folder, policy.mesh, keep=keep).save(policy, reference, state, tokenizer)


def load_checkpoint(
    path: Path,
    policy: Policy,
    reference: Reference | None,
    model: ModelConfig,
    vocab_size: int,
    *,
    verified: bool = False,
) -> CheckpointState:
    """Restore weights, optimizer and reference; returns the state. `path` is one checkpoint's folder.

    Args:
        verified: its files were checked against the manifest just now.

    Raises:
        CheckpointError: damaged, of another model, parameters' type or form of optimizer, or without the reference
            policy that is asked for.
    """
    state = state_of(read_state_file(path)) if verified else read_state(path)
    _check_model(path, state, model, vocab_size)
    written = read_state_file(path)
    _check_form(path, written, policy, reference)
    averaged = reference if reference is not None and reference.cfg.ema and written.has_average else None
    if averaged is not None:
        averaged.start_average()
    loaded = _load(path, _sharded(policy, reference, loading=True))
    with megatron_device():
        _load_into(policy.model, loaded["model"])
        try:
            load_optimizer(policy.optimizer, loaded["optimizer"])
            policy.scheduler.load_state_dict(loaded["scheduler"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise CheckpointError(
                f"{path}: its optimizer's state is not what it should be ({reason}); use an older checkpoint"
            ) from error
        if reference is not None:
            _load_into(reference.model, loaded["reference"])
        for name, tensor in (averaged.average or {}).items() if averaged is not None else ():
            tensor.copy_(loaded["average"][name])
    return state


def load_weights(path: Path, model: PolicyModel, config: ModelConfig, vocab_size: int) -> CheckpointState:
    """Load a checkpoint's policy weights only, into a model of the same shape and any layout.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    state = read_state(path)
    _check_model(path, state, config, vocab_size)
    with megatron_device():
        wanted = {"model": sharded_model(model, "model.")}
    loaded = _load(path, wanted)
    with megatron_device():
        _load_into(model, loaded["model"])
    return state


def model_of(path: Path) -> ModelConfig:
    """A checkpoint's model, its files not verified. Raises CheckpointError where it cannot be read."""
    return read_state_file(path).model


def stored_dtype(path: Path) -> torch.dtype:
    """The type that a checkpoint's weights are stored in, which the settings leave open when precision is "auto"."""
    return dtype_in_index(path / "sharded", _listed(path), "model.embedding.word_embeddings.weight")


def checkpoint_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer carried by a checkpoint."""
    return Tokenizer.load(path / "tokenizer.model")


def sharded_model(model: PolicyModel, prefix: str) -> dict[str, Any]:
    """A model's tensors alone: FP8 scales, Transformer Engine's extra state, are found anew within a few steps."""
    state = model.sharded_state_dict(prefix=prefix)
    return {name: part for name, part in state.items() if not name.endswith(_EXTRA_STATE)}


def _sharded(policy: Policy, reference: Reference | None, *, loading: bool) -> dict[str, Any]:
    with megatron_device():
        model = sharded_model(policy.model, "model.")
        parts: dict[str, Any] = {
            "model": model,
            "optimizer": policy.optimizer.sharded_state_dict(
                model, is_loading=loading, metadata=_OPTIMIZER_METADATA
            ),
            "scheduler": policy.scheduler.state_dict(),
        }
        if reference is not None:
            parts["reference"] = sharded_model(reference.model, "reference.")
            if reference.average is not None:
                parts["average"] = _sharded_average(reference.model, reference.average)
    return parts


def _sharded_average(model: PolicyModel, average: dict[str, Any]) -> dict[str, Any]:
    """The moving average's tensors, each cut like the parameter whose average it is."""
    by_parameter = {id(p): average[name] for name, p in model.named_parameters()}
    parts: dict[str, Any] = {}
    for name, part in sharded_model(model, "average.").items():
        ours = by_parameter[id(part.data)]
        changes = {"dtype": ours.dtype} if isinstance(part, ShardedTensor) else {}
        parts[name] = replace(part, data=ours, **changes)
    return parts


def _load(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    loaded = load_tensors(path / "sharded", wanted, _listed(path))
    return {part: _strip(part, tensors) for part, tensors in loaded.items()}


def _listed(path: Path) -> set[str]:
    """The files of the tensors that a checkpoint's manifest lists."""
    return {n.removeprefix("sharded/") for n in read_manifest(path) if n.startswith("sharded/")}


def _load_into(model: PolicyModel, tensors: dict[str, Any]) -> None:
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all(name.endswith(_EXTRA_STATE) for name in missing), (missing, unexpected)


def _strip(part: str, tensors: Any) -> Any:
    if part not in ("model", "reference", "average"):
        return tensors
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}


def _check_form(path: Path, written: StateFile, policy: Policy, reference: Reference | None) -> None:
    if reference is not None and not written.has_reference:
        raise CheckpointError(f"{path}: holds no reference policy; start a new run with init={path}")
    if written.distributed_optimizer != policy.has_distributed_optimizer:
        raise CheckpointError(
            f"{path}: written with parallel.distributed_optimizer={str(written.distributed_optimizer).lower()}, "
            "whose optimizer state has another form; resume with the same setting, or start a new run with init"
        )
    if written.dtype not in (None, _dtype_of(policy)):
        raise CheckpointError(
            f"{path}: parameters of {written.dtype}, here they are {_dtype_of(policy)}, whose optimizer has another "
            "form; resume with model.precision as it was, or start a new run with init"
        )


def _check_model(path: Path, state: CheckpointState, model: ModelConfig, vocab_size: int) -> None:
    ours, theirs = (m.model_dump(exclude={"precision", "fp8", "attention"}) for m in (model, state.model))
    ours["vocab_size"], theirs["vocab_size"] = vocab_size, state.vocab_size
    differing = [f"{key} {theirs[key]} != {ours[key]}" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise CheckpointError(
            f"{path}: checkpoint of another model ({', '.join(differing)}); set [model] to the checkpoint's"
        )


def _dtype_of(policy: Policy) -> str:
    """Type of the parameters: "float32", "bfloat16"."""
    return str(next(policy.model.parameters()).dtype).removeprefix("torch.")


def _make_anew(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "sharded").mkdir(parents=True)


def _reason(error: BaseException) -> str:
    """In one line; the system's own words where a full disk or the like lies at the bottom of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    with suppress(IndexError):
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return type(error).__name__
