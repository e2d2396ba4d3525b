"""Writing that leaves nothing half-written (temporary file, fsync, rename), and folders with one writer."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sip_engine.utils.errors import DataError
from sip_engine.utils.jsonl import parse_json
from sip_engine.utils.regular import open_regular, read_text


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Raise DataError unless a file (or a folder) can be made at `path`, or replaced; makes nothing."""
    wanted = "a folder" if folder else "a file"
    try:
        exists, right_kind = path.exists(), path.is_dir() if folder else path.is_file()
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another path") from None
    if exists and not right_kind:
        raise DataError(
            f"{path}: {wanted} cannot be written there, it exists as something else; choose another path"
        )
    above = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if (above != path.absolute() and not above.is_dir()) or not os.access(above, os.W_OK):
        raise DataError(f"{path}: cannot be written, {above} is not a writable folder; choose another path")


def lock_folder(folder: Path) -> IO[str] | None:
    """Make a folder ours alone (`.lock` in it); None where another process holds it.

    It stays ours until the file is closed, here and in every process that inherits it. A file system without locks
    lets everyone in. Raises DataError where the folder cannot be written.
    """
    path, tries = folder / ".lock", 3
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open_regular(path, "w")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); choose another path") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            if (
                tries > 1
            ):  # one who only looked whether anyone is at work (`sessions.is_held`) is gone at once
                tries -= 1
                time.sleep(0.05)
                continue
            return None
        except OSError:
            return lock
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            return lock
        lock.close()  # it was released, and removed, between opening and locking it


def release_folder(folder: Path, lock: IO[str]) -> None:
    """Let go of what `lock_folder` gave; a folder in which nothing came to be is removed."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()
    lock.close()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by text (UTF-8) or bytes in one step; a crash leaves the old file or none. Raises DataError."""
    check_writable(path)
    path = path.resolve()  # what a link stands for is replaced, not the link
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_regular(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another path") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, keep: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """An empty folder beside `path` that becomes it, synced, when the block ends well, and vanishes when not.

    Args:
        keep: What to do where a folder is already there in the end: it stays, and the new one goes, if this says
            so of it; else it makes way. Without it, only an empty folder may be there.

    Raises:
        OSError: it cannot be written. The caller knows what to tell the user.
    """
    temporary = _beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            sync(written)
        _take_place(temporary, path, keep)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(folder: Path, path: Path, keep: Callable[[Path], bool] | None) -> None:
    while True:
        try:
            folder.rename(path)
        except OSError:
            if keep is None or not path.exists():
                raise
            if keep(path):
                return
            aside = _beside(path)
            with suppress(FileNotFoundError):  # another process may have been first
                path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            sync(path.parent)
            return


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    """A hidden name in the same folder that nobody else has."""
    return path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}.tmp")


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp", re.DOTALL)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder; nobody else may be writing there."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of a JSON document."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file of ours holds. Raises DataError."""
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); remove it and make it anew") from None


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """`write_atomic` of one JSON document a line; returns the number of lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_atomic(path, "".join(line + "\n" for line in lines))
    return len(lines)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
