"""A checkpoint's folder: its name, its manifest, how it comes to be in one step, and which ones stay.

Only `step_` and eight digits are ours. A checkpoint is written as `.step_NNNNNNNN.tmp`; its files are synced, then
the folders, then it gets its name, and only then older ones go. No tensors here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sip_engine.distributed.mesh import Mesh
from sip_engine.utils.errors import CheckpointError
from sip_engine.utils.files import sha256_of, sync, write_json
from sip_engine.utils.names import stays_inside
from sip_engine.utils.regular import read_text

MANIFEST = "manifest.json"
"""File of a checkpoint that names the content of all others, written last."""
_OURS = re.compile(r"step_\d{8}")
_STALE = re.compile(r"\.step_\d{8}(\..+)?\.tmp")


class DamagedCheckpoint(CheckpointError):
    """A file that the manifest lists is missing or differs."""


class FileEntry(BaseModel):
    """What the manifest says of one file."""

    model_config = ConfigDict(strict=True, frozen=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        return cls(bytes=path.stat().st_size, sha256=sha256_of(path))


_ENTRIES = TypeAdapter(dict[str, FileEntry])


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or is to lie."""
    return folder / f"step_{step:08d}"


def temporary_folder(final: Path) -> Path:
    """Where it is written before it gets its name."""
    return final.with_name(f".{final.name}.tmp")


def complete_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run that have their manifest, oldest first; folders with other names are not ours."""
    return sorted(p for p in folder.glob("step_*") if _OURS.fullmatch(p.name) and (p / MANIFEST).is_file())


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder of checkpoints."""
    found = complete_checkpoints(folder)
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


def write_manifest(folder: Path, known: Mapping[str, FileEntry] | None = None) -> None:
    """List every file of a folder; `known` has those that another process hashed, by name."""
    known = known or {}
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    entries = {name: known.get(name) or FileEntry.of(folder / name) for name in names if name != MANIFEST}
    write_json(folder / MANIFEST, {name: entry.model_dump() for name, entry in entries.items()})


def read_manifest(path: Path) -> dict[str, FileEntry]:
    """The manifest of a checkpoint, which must list its files, all of them and nothing outside of it.

    Raises:
        CheckpointError: it is none, its names leave the folder, or files lie there that it does not list.
        DamagedCheckpoint: it is not readable any more.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: not a checkpoint (no readable {MANIFEST}); give a step_* folder")
    try:
        entries = _ENTRIES.validate_python(json.loads(read_text(path / MANIFEST)))
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        raise DamagedCheckpoint(
            f"{path / MANIFEST}: not a checkpoint's manifest ({_first_line(error)}); use an older checkpoint "
            "or copy it anew"
        ) from None
    outside = [name for name in entries if not stays_inside(name)]
    if outside:
        raise CheckpointError(
            f"{path / MANIFEST}: {outside[0]!r} is no name inside the folder; do not trust it"
        )
    if not (
        {"state.json", "tokenizer.model"} <= entries.keys() and any(n.startswith("sharded/") for n in entries)
    ):
        raise CheckpointError(
            f"{path}/{MANIFEST}: does not list a checkpoint's files; copy the checkpoint anew"
        )
    for found in sorted(path.rglob("*")):
        name = found.relative_to(path).as_posix()
        if name != MANIFEST and name not in entries and (found.is_symlink() or not found.is_dir()):
            raise CheckpointError(
                f"{found}: {MANIFEST} does not list it, so it is not the checkpoint's; remove it, or copy the "
                "checkpoint anew"
            )
    return entries


def verify(path: Path, *, part: int = 0, parts: int = 1) -> None:
    """Check a checkpoint's manifest, and every `parts`-th of its files against it.

    Raises:
        CheckpointError: it is no checkpoint. DamagedCheckpoint: a file is missing or differs.
    """
    entries = read_manifest(path)
    for name in sorted(entries)[part::parts]:
        file, stated = path / name, entries[name]
        try:
            whole = (
                file.is_file() and file.stat().st_size == stated.bytes and sha256_of(file) == stated.sha256
            )
        except OSError:
            whole = False
        if not whole:
            raise DamagedCheckpoint(
                f"{file}: missing or damaged (differs from manifest.json); use an older checkpoint or copy it anew"
            )


def verify_together(path: Path, mesh: Mesh) -> None:
    """`verify` with the files shared out over all processes; all raise what the first of them found."""
    found: CheckpointError | None = None
    try:
        verify(path, part=mesh.rank, parts=mesh.size)
    except CheckpointError as error:
        found = error
    for error in mesh.gather(found):
        if error is not None:
            raise error


def newest_intact(folder: Path, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are whole, verified; and what was wrong with the newer ones.

    These are set aside (`step_NNNNNNNN.damaged`), so that they are neither used nor pruned. None where there are no
    checkpoints at all.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; they stay as they are.
    """
    faults: list[tuple[Path, DamagedCheckpoint]] = []
    for path in reversed(mesh.broadcast(complete_checkpoints(folder) if mesh.is_main else None)):
        try:
            verify_together(path, mesh)
        except DamagedCheckpoint as error:
            faults.append((path, error))
            continue
        if mesh.is_main:
            for damaged, _ in faults:
                _set_aside(damaged)
        mesh.barrier()
        return path, [str(error) for _, error in faults]
    if faults:
        raise faults[0][1]
    return None, []


def commit(temporary: Path, final: Path) -> None:
    """Give a folder whose files are written its name: after this, a loss of power leaves it there and whole."""
    for written in sorted(temporary.rglob("*")):
        sync(written)
    sync(temporary)
    with suppress(FileNotFoundError):
        replaced = _renamed_away(final)
        temporary.rename(final)
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return
    temporary.rename(final)
    sync(final.parent)


def prune(folder: Path, *, keep: int, keep_every: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints and those whose step is a multiple of `keep_every`."""
    for old in complete_checkpoints(folder)[:-keep]:
        if not keep_every or int(old.name.removeprefix("step_")) % keep_every:
            shutil.rmtree(_renamed_away(old), ignore_errors=True)


def remove_stale(folder: Path) -> None:
    """Remove what an interrupted save or pruning left; nobody else may be writing there."""
    for path in folder.glob(".step_*.tmp"):
        if _STALE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _renamed_away(path: Path) -> Path:
    """A folder under a name that `remove_stale` finds, so that it is never seen half removed."""
    aside = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def _set_aside(path: Path) -> None:
    taken: Iterable[Path] = (
        path.with_name(f"{path.name}.damaged{f'-{n}' if n else ''}") for n in range(1_000)
    )
    with suppress(OSError):  # on a folder that cannot be written it stays, and is passed over again
        path.rename(next(p for p in taken if not p.exists()))


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
