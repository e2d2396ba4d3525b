"""The one place that opens files by name: regular ones only, so that no FIFO, socket or device is waited for.

What a library opens by itself goes through `check_regular` first.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

Path = str | os.PathLike[str]
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path) -> None:
    """Raise OSError unless there is a regular file at `path`, or a link to one; it is not opened."""
    _check(os.stat(path).st_mode, path)


def open_regular(path: Path, mode: str = "rb", **named: Any) -> Any:
    """`open` of a regular file: OSError, at once, for whatever else lies at `path`."""
    return open(path, mode, opener=_opener, **named)


def read_bytes(path: Path) -> bytes:
    """All of a regular file. OSError as `open_regular` raises it."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """All of a regular file. OSError as `open_regular` raises it; UnicodeDecodeError."""
    with open_regular(path, "r", encoding=encoding) as file:
        return file.read()


def _opener(path: str, flags: int) -> int:
    if os.path.exists(path):
        check_regular(path)  # to open a device may do something to it
    handle = os.open(path, flags | os.O_NONBLOCK, 0o666)
    try:
        _check(os.fstat(handle).st_mode, path)
    except OSError:
        os.close(handle)
        raise
    return handle


def _check(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise OSError(errno.EINVAL, f"{kind}, must be a regular file", str(path))
