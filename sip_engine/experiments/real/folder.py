"""What a folder of `sip real` was begun with: it goes on with that alone; a first start that fails leaves nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sip_engine.config.parse import changed_settings
from sip_engine.experiments.real.results import read_numbers
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.files import sweep, write_json

BEGUN = "real.json"
_DOCUMENTS = "documents"
_MINUTES = {"minutes": 0.0, "judge_minutes": 0.0}
"""Numbers of a recipe, and what is meant where one is missing: earlier versions trained no judge."""
_MADE = (
    "model",
    "model_unpacked",
    "text",
    "cache",
    "checkpoints",
    "continued_*",
    "judge",
    "scratch_*",
    "spent.json",
    "summary.json",
)
"""Names of what is made in a folder, here or by a training run."""


def begun_judge_minutes(out: Path) -> float | None:
    """Those of a folder that was begun; 0 where it was by a version that trained no judge."""
    return read_numbers(out / BEGUN, _MINUTES)["judge_minutes"] if (out / BEGUN).is_file() else None


@contextmanager
def beginning(out: Path, recipe: dict[str, Any]) -> Iterator[None]:
    """Within it a folder is made ready for what `recipe` asks for; a judge may join or be left later.

    If that fails in a folder that was new, all that came to be there goes again: another model or text may be tried.

    Raises:
        ConfigError: the folder was begun with something else, or holds what another command has made.
    """
    for folder in (out, out / "judge", out / "text", out / "cache"):
        sweep(folder)
    there = set(out.iterdir())
    is_new = not (out / BEGUN).is_file()
    if is_new and (taken := sorted(path for name in _MADE for path in out.glob(name))):
        raise ConfigError(
            f"{taken[0]}: is there already, and no `sip real` was begun in this folder; choose another --out"
        )
    _record(out / BEGUN, recipe)
    try:
        yield
    except Exception:
        if is_new:
            for path in set(out.iterdir()) - there:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def _record(path: Path, recipe: dict[str, Any]) -> None:
    """Write down what was asked for, or refuse to go on with something else."""
    before = read_numbers(path, _MINUTES) if path.is_file() else {}
    if before and not (before["judge_minutes"] and recipe["judge_minutes"]):
        before["judge_minutes"] = recipe["judge_minutes"]
    if changes := changed_settings(before, recipe):
        name, _, was = changes[0].split(" -> ")[0].partition(" ")
        if name == "minutes":
            name, was = "--minutes", f"{before['minutes'] + before['judge_minutes']:g}"
        raise ConfigError(
            f"{path.parent} was begun with {name} {was}: go on with that, or choose another --out"
        )
    write_json(path, {**before, **recipe})


def check_documents(out: Path, documents: dict[str, Any]) -> None:
    """Write down which documents a begun folder is about (`SampleStream.state_dict`'s order), or refuse others.

    Raises:
        ConfigError: they have changed, so that nothing measured before could be compared with what is measured now.
    """
    path = out / BEGUN
    begun = read_numbers(path, _MINUTES)
    if begun.setdefault(_DOCUMENTS, documents) != documents:
        raise ConfigError(
            f"{out} was begun with other documents than {begun['text'] or out / 'text'} holds now, or they are cut "
            "otherwise: put back what was there, or choose another --out"
        )
    write_json(path, begun)
