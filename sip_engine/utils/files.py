"""Writing that leaves nothing half-written (temporary file, fsync, rename), and folders with one writer."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from sip_engine.utils.errors import DataError


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
    path = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); choose another path") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
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


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step; a crash leaves the old file or none. Raises DataError."""
    check_writable(path)
    path = path.resolve()  # what a link stands for is replaced, not the link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another path") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of a JSON document."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file of ours holds. Raises DataError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); remove it and make it anew") from None


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """`write_atomic` of one JSON document a line; returns the number of lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_atomic(path, "".join(line + "\n" for line in lines))
    return len(lines)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
