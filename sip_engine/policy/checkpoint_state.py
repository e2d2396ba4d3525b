"""state.json of a checkpoint: what it knows beside tensors, and which versions of the format are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from sip_engine.config.model import ModelConfig
from sip_engine.policy.checkpoint_files import verify
from sip_engine.utils.errors import CheckpointError
from sip_engine.utils.files import write_json
from sip_engine.utils.regular import read_text

FORMAT = 2
"""Written. 1 had no moving average of a reference policy; both are read."""
_STATE = "state.json"


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint knows beside tensors."""

    step: int
    model: ModelConfig
    vocab_size: int
    run: dict[str, Any]
    """Everything else a run needs to go on: data position, settings, seconds spent.

    There are no states of random generators: every draw (order of data, sampling, a server's seeds, and with them the
    keys of its cached replies) is a function of the seed in the settings, the step and the sample.
    """


class StateFile(BaseModel, strict=True, frozen=True):
    """The file's content, checked."""

    format: int
    step: Annotated[int, Field(ge=0, lt=10**8)]
    model: Annotated[ModelConfig, Field(strict=False)]
    vocab_size: Annotated[int, Field(gt=0)]
    has_reference: bool = False
    has_average: bool = False
    distributed_optimizer: bool = False
    dtype: str | None = None
    """Type of the parameters: "float32", "bfloat16"."""
    run: dict[str, Any]


def write_state(
    folder: Path,
    state: CheckpointState,
    *,
    has_reference: bool = False,
    has_average: bool = False,
    distributed_optimizer: bool = False,
    dtype: str | None = None,
) -> None:
    """Write a checkpoint's state.json."""
    file = StateFile(
        format=FORMAT,
        step=state.step,
        model=state.model,
        vocab_size=state.vocab_size,
        has_reference=has_reference,
        has_average=has_average,
        distributed_optimizer=distributed_optimizer,
        dtype=dtype,
        run=state.run,
    )
    write_json(folder / _STATE, file.model_dump(mode="json"))


def read_state(path: Path) -> CheckpointState:
    """A checkpoint's state after its files were checked against the manifest.

    Raises:
        CheckpointError: a file is missing or differs, or the format is not ours.
    """
    verify(path)
    return state_of(read_state_file(path))


def state_of(file: StateFile) -> CheckpointState:
    """What the file says, without how the tensors were written."""
    return CheckpointState(file.step, file.model, file.vocab_size, file.run)


def read_state_file(path: Path) -> StateFile:
    """state.json of the checkpoint `path`, its other files unread.

    Raises:
        CheckpointError: unreadable, not what it should be, or of a newer format.
    """
    try:
        raw = json.loads(read_text(path / _STATE))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / _STATE}: not readable ({error})") from None
    version = raw.get("format") if isinstance(raw, dict) else None
    if type(version) is int and version > FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {version}, this version reads up to {FORMAT}; it was written by a newer "
            "sip-engine: install that one"
        )
    try:
        file = StateFile.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "it"
        raise CheckpointError(f"{path / _STATE}: {where}: {fault['msg']}; copy the checkpoint anew") from None
    if file.format < 1:
        raise CheckpointError(f"{path}: checkpoint format {file.format}, this version reads 1 to {FORMAT}")
    return file
