"""A run that begins from a checkpoint has that checkpoint's [model]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sip_engine.config.model import ModelConfig
from sip_engine.utils.errors import CheckpointError, ConfigError

OWN = ("precision", "fp8", "init_std", "attention")
"""What a run says of its model for itself."""


def with_model_of_init(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A run's settings with [model] filled in from the checkpoint that `init` names, where there is one.

    A run that is resumed after its `init` was moved away has the model of its own checkpoints.

    Raises:
        ConfigError: a key of [model] is given and says something else.
    """
    given = values.get("model", {})
    if not values.get("init") or not isinstance(given, dict):
        return values
    from sip_engine.policy.checkpoint import model_of  # takes seconds

    found = _checkpoint_of(values)
    if found is None:
        return values  # to be said where it is opened
    theirs = model_of(found).model_dump(exclude=set(OWN))
    try:
        ours = ModelConfig.model_validate({**theirs, **given}).model_dump()
    except ValidationError:
        return values  # wrong in itself, as is then said of it
    wrong = [
        f"model.{name} = {ours[name]}, there {theirs[name]}" for name in theirs if ours[name] != theirs[name]
    ]
    if wrong:
        raise ConfigError(
            f"{source}: {'; '.join(wrong)}: the model is that of init = {values['init']}; leave these keys out"
        )
    return {**values, "model": {**theirs, **given}}


def _checkpoint_of(values: dict[str, Any]) -> Path | None:
    from sip_engine.policy.checkpoint import latest_checkpoint, resolve_checkpoint

    try:
        return resolve_checkpoint(Path(str(values["init"])))
    except CheckpointError:
        return (
            latest_checkpoint(Path(str(values.get("out", ""))) / "checkpoints") if "out" in values else None
        )
