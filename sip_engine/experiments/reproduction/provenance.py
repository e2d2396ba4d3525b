"""What a job of a reproduction is made of, on record from its beginning: nothing else resumes or keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sip_engine.config.parse import changed_settings
from sip_engine.utils.errors import ConfigError, DataError
from sip_engine.utils.files import read_json, sha256_of, write_json

STAGE_RESULT, RESULT = "stage.json", "result.json"
_BEGUN = "begun.json"


def begin(folder: Path, recipe: dict[str, Any], needs: Iterable[Path]) -> dict[str, Any]:
    """Record what a job is made of before it leaves anything to resume from; returns that.

    Raises:
        ConfigError: the job was begun with other settings, or from another making of what it needs.
    """
    check_begun(folder, recipe, needs)
    made = {"recipe": recipe, "made_from": _fingerprints(needs)}
    write_json(folder / _BEGUN, made)
    return made


def check_begun(folder: Path, recipe: dict[str, Any], needs: Iterable[Path]) -> None:
    """Raise ConfigError if the job in a folder was begun otherwise."""
    if (folder / _BEGUN).is_file():
        _check(folder, "begun", read_json(folder / _BEGUN), recipe, needs)


def check_done(result: Path, recipe: dict[str, Any], needs: Iterable[Path]) -> None:
    """Raise ConfigError if a result was made otherwise, DataError if it is none."""
    _check(result.parent, "made", read_json(result), recipe, needs)


def _check(folder: Path, done: str, found: Any, recipe: dict[str, Any], needs: Iterable[Path]) -> None:
    if not isinstance(found, dict) or not {"recipe", "made_from"} <= found.keys():
        raise DataError(f"{folder}: holds no record of `sip reproduce`; remove it to make it anew")
    now = _fingerprints(needs)
    changes = [f"with other settings ({change})" for change in changed_settings(found["recipe"], recipe)]
    for name, digest in found["made_from"].items():
        if name not in now:
            changes.append(f"from {name}, which is gone")
        elif now[name] != digest:
            changes.append(f"from another {name}")
    if changes:
        raise ConfigError(
            f"{folder} was {done} {changes[0]}: remove it to make it anew, or choose another --out"
        )


def _fingerprints(stages: Iterable[Path]) -> Mapping[str, str]:
    """Name of each stage that is done -> digest of its result: another making of it has another one."""
    return {f.name: sha256_of(f / STAGE_RESULT) for f in stages if (f / STAGE_RESULT).is_file()}
