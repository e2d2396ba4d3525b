"""Checkpoints: Megatron's sharded weights and optimizer, the run's state, and a manifest with hashes.

    step_00000100/
        sharded/          Megatron-core dist_checkpointing: loads at any tensor x pipeline x data layout
        state.json        step, data position, settings, vocabulary
        tokenizer.model
        manifest.json     size and sha256 of every file above; written last

A checkpoint is written beside its final name and renamed, so that a folder with that name is complete.
The sharded part uses torch's checkpoint format, whose index is a pickle: load only checkpoints you trust.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling

from sip_engine.config.schema import ModelConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.megatron_cpu import megatron_device
from sip_engine.policy.adam_state import load_optimizer
from sip_engine.policy.model import PolicyModel
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.utils.errors import CheckpointError
from sip_engine.utils.files import sha256_of, write_json

FORMAT = 1
MANIFEST = "manifest.json"
"""File of a checkpoint that names the content of all others, written last."""
_EXTRA_STATE = "_extra_state"
_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint knows beside tensors."""

    step: int
    model: ModelConfig
    vocab_size: int
    run: dict[str, Any]
    """Everything else a run needs to go on: data position, settings, seconds spent."""


def save_checkpoint(
    folder: Path,
    policy: Policy,
    reference: Reference | None,
    state: CheckpointState,
    tokenizer: Tokenizer,
    *,
    keep: int,
) -> Path:
    """Write `folder/step_N` and remove all but the newest `keep`. Called by every process."""
    mesh = policy.mesh
    final = folder / f"step_{state.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    if mesh.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "sharded").mkdir(parents=True)
    mesh.barrier()
    with megatron_device(), _quiet_megatron(), _results_in_process():
        dist_checkpointing.save(_sharded(policy, reference, loading=False), str(temporary / "sharded"))
    mesh.barrier()
    if mesh.is_main:
        tokenizer.save(temporary / "tokenizer.model")
        write_json(
            temporary / "state.json",
            {
                "format": FORMAT,
                "step": state.step,
                "model": state.model.model_dump(),
                "vocab_size": state.vocab_size,
                "has_reference": reference is not None,
                "distributed_optimizer": policy.has_distributed_optimizer,
                "dtype": _dtype_of(policy),
                "run": state.run,
            },
        )
        _write_manifest(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    mesh.barrier()
    return final


def load_checkpoint(
    path: Path, policy: Policy, reference: Reference | None, model: ModelConfig, vocab_size: int
) -> CheckpointState:
    """Restore weights, optimizer and reference; returns the state. `path` is one checkpoint's folder.

    Raises:
        CheckpointError: damaged, of another model, parameters' type or form of optimizer, or without the reference
            policy that is asked for.
    """
    state = read_state(path)
    _check_model(path, state, model, vocab_size)
    written = _raw_state(path)
    if reference is not None and not written["has_reference"]:
        raise CheckpointError(f"{path}: holds no reference policy; start a new run with init={path}")
    sharded_optimizer = written["distributed_optimizer"]
    if sharded_optimizer != policy.has_distributed_optimizer:
        raise CheckpointError(
            f"{path}: written with parallel.distributed_optimizer={str(sharded_optimizer).lower()}, whose optimizer "
            "state has another form; resume with the same setting, or start a new run with init"
        )
    theirs, ours = written.get("dtype"), _dtype_of(policy)
    if theirs not in (None, ours):
        raise CheckpointError(
            f"{path}: parameters of {theirs}, here they are {ours}, whose optimizer has another form; resume with "
            "model.precision as it was, or start a new run with init"
        )
    wanted = _sharded(policy, reference, loading=True)
    loaded = _load_sharded(path, wanted)
    with megatron_device():
        _load_into(policy.model, loaded["model"])
        load_optimizer(policy.optimizer, loaded["optimizer"])
        policy.scheduler.load_state_dict(loaded["scheduler"])
        if reference is not None:
            _load_into(reference.model, loaded["reference"])
    return state


def load_weights(path: Path, model: PolicyModel, config: ModelConfig, vocab_size: int) -> CheckpointState:
    """Load a checkpoint's policy weights only, into a model of the same shape and any layout.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    state = read_state(path)
    _check_model(path, state, config, vocab_size)
    with megatron_device():
        wanted = {"model": _sharded_model(model, "model.")}
    loaded = _load_sharded(path, wanted)
    with megatron_device():
        _load_into(model, loaded["model"])
    return state


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder of checkpoints."""
    found = _complete(folder)
    return found[-1] if found else None


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint a user means: the folder itself, or the newest of a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        newest = latest_checkpoint(folder)
        if newest is not None:
            return newest
    raise CheckpointError(
        f"{path}: no checkpoint here; give a run's folder or one of its checkpoints/step_* folders"
    )


def read_state(path: Path) -> CheckpointState:
    """A checkpoint's state after its files were checked against the manifest.

    Raises:
        CheckpointError: a file is missing or differs, or the format is not ours.
    """
    _verify(path)
    raw = _raw_state(path)
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {raw.get('format')}, this version reads {FORMAT}")
    return CheckpointState(raw["step"], ModelConfig(**raw["model"]), raw["vocab_size"], raw["run"])


def model_of(path: Path) -> ModelConfig:
    """A checkpoint's model, its files not verified. Raises CheckpointError where it cannot be read."""
    try:
        return ModelConfig(**_raw_state(path)["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}/state.json: not readable ({error!r})".split("\n")[0]) from None


def checkpoint_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer carried by a checkpoint."""
    return Tokenizer.load(path / "tokenizer.model")


def _sharded(policy: Policy, reference: Reference | None, *, loading: bool) -> dict[str, Any]:
    model = _sharded_model(policy.model, "model.")
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(
            model, is_loading=loading, metadata=_OPTIMIZER_METADATA
        ),
        "scheduler": policy.scheduler.state_dict(),
    }
    if reference is not None:
        parts["reference"] = _sharded_model(reference.model, "reference.")
    return parts


def _sharded_model(model: PolicyModel, prefix: str) -> dict[str, Any]:
    """A model's tensors alone: FP8 scales, Transformer Engine's extra state, are found anew within a few steps."""
    state = model.sharded_state_dict(prefix=prefix)
    return {name: part for name, part in state.items() if not name.endswith(_EXTRA_STATE)}


def _load_into(model: PolicyModel, tensors: dict[str, Any]) -> None:
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all(name.endswith(_EXTRA_STATE) for name in missing), (missing, unexpected)


def _load_sharded(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        with megatron_device(), _quiet_megatron():
            loaded: Any = dist_checkpointing.load(
                wanted, str(path / "sharded"), strict=StrictHandling.RAISE_UNEXPECTED
            )
    except Exception as error:  # Megatron and torch raise many types for one cause: an unreadable file
        raise CheckpointError(
            f"{path}: cannot be loaded ({type(error).__name__}: {error})".split("\n")[0]
        ) from error
    return {part: _strip(part, tensors) for part, tensors in loaded.items()}


def _strip(part: str, tensors: Any) -> Any:
    if part not in ("model", "reference"):
        return tensors
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}


def _check_model(path: Path, state: CheckpointState, model: ModelConfig, vocab_size: int) -> None:
    ours, theirs = (m.model_dump(exclude={"precision", "fp8"}) for m in (model, state.model))
    ours["vocab_size"], theirs["vocab_size"] = vocab_size, state.vocab_size
    differing = [f"{key} {theirs[key]} != {ours[key]}" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise CheckpointError(
            f"{path}: checkpoint of another model ({', '.join(differing)}); set [model] to the checkpoint's"
        )


def _dtype_of(policy: Policy) -> str:
    """Type of the parameters: "float32", "bfloat16"."""
    return str(next(policy.model.parameters()).dtype).removeprefix("torch.")


def _raw_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}/state.json: not readable ({error})") from None


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}
    write_json(folder / MANIFEST, entries)


def _verify(path: Path) -> None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(
            f"{path}: not a checkpoint (no readable manifest.json); give a step_* folder"
        ) from None
    entries = manifest if isinstance(manifest, dict) else {}
    if not (
        {"state.json", "tokenizer.model"} <= entries.keys() and any(n.startswith("sharded/") for n in entries)
    ):
        raise CheckpointError(
            f"{path}/{MANIFEST}: does not list a checkpoint's files; copy the checkpoint anew"
        )
    for name, entry in entries.items():
        file, stated = path / name, entry if isinstance(entry, dict) else {}
        size, digest = stated.get("bytes"), stated.get("sha256")
        if not file.is_file() or file.stat().st_size != size or sha256_of(file) != digest:
            raise CheckpointError(
                f"{file}: missing or damaged (differs from manifest.json); use an older checkpoint or copy it anew"
            )


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if (p / MANIFEST).is_file())


@contextmanager
def _results_in_process() -> Iterator[None]:
    """Megatron passes on what it wrote through a process of its own, which a save that waits does not need.

    Starting that process takes seconds, since it imports torch and the program's main module.
    """
    before = filesystem_async._results_queue
    filesystem_async._results_queue = Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


class _quiet_megatron:
    """Megatron logs every save at warning level; a progress bar and our own records say enough."""

    def __enter__(self) -> None:
        self._level = logging.getLogger("megatron.core").level
        logging.getLogger("megatron.core").setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("megatron.core").setLevel(self._level)
