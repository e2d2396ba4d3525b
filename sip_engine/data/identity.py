"""Which content a file has: its SHA-256, read once and remembered by size, time and samples of the content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from sip_engine.data.indexed import sampled_hash
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_atomic
from sip_engine.utils.regular import open_regular, read_text

OnBytes = Callable[[int], object]

_BLOCK_BYTES = 2**20
_THREADS = 8
"""Reading waits for the disk, and hashing leaves the interpreter to others."""


class Identities:
    """SHA-256 of files, remembered in `folder` so that a file is read whole when it is first met, and no more.

    A file is known again by its size, its time of change and sixteen samples of its content. One that was moved or
    copied, and so has another time, is read once more.
    """

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        """verify: read every file whole, whatever is remembered."""
        self._folder, self._verify = folder, verify

    def of(self, files: Sequence[Path], on_bytes: OnBytes) -> list[str]:
        """Hex digests of files; `on_bytes` gets the bytes of each that are read or known. Raises DataError."""
        pool = ThreadPoolExecutor(_THREADS)
        try:
            return list(pool.map(lambda file: self._of(file, on_bytes), files))
        finally:
            pool.shutdown(cancel_futures=True)

    def _of(self, file: Path, on_bytes: OnBytes) -> str:
        with _reading(file):
            before = file.stat()
            memory = self._folder / f"{sampled_hash(file)}-{before.st_mtime_ns}"
            if not self._verify:
                with suppress(OSError, ValueError):
                    digest, _, check = read_text(memory).partition(" ")
                    if check == _check(digest):
                        on_bytes(before.st_size)
                        return digest
            digest, after = _sha256(file, on_bytes), file.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{file}: changes while it is read; wait until it is written, and start again")
        with suppress(DataError):  # where the cache can only be read, nothing is remembered
            write_atomic(memory, f"{digest} {_check(digest)}")
        return digest


def _check(digest: str) -> str:
    """What stands behind a remembered digest, so that a damaged one is not believed."""
    return hashlib.sha256(digest.encode()).hexdigest()[:16]


def _sha256(file: Path, on_bytes: OnBytes) -> str:
    digest = hashlib.sha256()
    with open_regular(file, buffering=0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{file}: no longer there; put it back, or start anew without it") from None
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); make it readable or remove it"
        ) from error


def total_bytes(files: Sequence[Path]) -> int:
    """Bytes of files, as far as they are there."""
    total = 0
    for file in files:
        with suppress(OSError):
            total += os.stat(file).st_size
    return total
