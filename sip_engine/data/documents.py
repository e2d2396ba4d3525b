"""Reads raw text files as a stream of documents and counts the documents it has to skip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sip_engine.data.formats import (
    EMPTY,
    HAS_NUL,
    MAX_RECORD_BYTES,
    NOT_UTF8,
    Skip,
    UnusableFile,
    read_texts,
    split_text,
)
from sip_engine.data.inventory import Counts as SkipCounts
from sip_engine.data.inventory import take_inventory
from sip_engine.utils.errors import DataError

MAX_DOCUMENT_BYTES = 16 * 2**20

__all__ = ["MAX_DOCUMENT_BYTES", "SkipCounts", "list_input_files", "read_documents", "read_files"]


def list_input_files(path: str | Path) -> list[Path]:
    """The files that `read_documents(path)` reads, in its order. Raises DataError: see `take_inventory`."""
    return take_inventory(path).files


def read_documents(
    path: str | Path,
    text_column: str = "text",
    *,
    max_bytes: int = MAX_DOCUMENT_BYTES,
    max_record_bytes: int = MAX_RECORD_BYTES,
    skips: SkipCounts | None = None,
    on_bytes: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[str]:
    """Yields the documents under `path`, one at a time, unchanged.

    path: a directory, or one file. A .txt, .md or .rst file is one document, or several between its end-of-text
        marks; JSON and CSV files hold one in each record, Parquet and Arrow one in each row, in `text_column`.
    max_bytes: a larger document becomes several, which end with a line.
    max_record_bytes: a longer line of JSON is skipped.
    skips: filled while iterating with what had to be skipped, by reason.
    on_bytes: called with the number of input bytes read since its last call, for a progress bar.

    Raises DataError at once if there is nothing to read, and while iterating if a file is damaged, or no document
    is left in the end: then it names the first file without a column of texts, if there is one.
    """
    skips = SkipCounts() if skips is None else skips
    return _read(
        Path(path), list_input_files(path), text_column, max_bytes, max_record_bytes, skips, on_bytes
    )


def _read(
    path: Path,
    files: list[Path],
    text_column: str,
    max_bytes: int,
    max_record_bytes: int,
    skips: SkipCounts,
    on_bytes: Callable[[int], object],
) -> Iterator[str]:
    num_documents = 0
    faults: list[str] = []
    for document in read_files(
        files,
        text_column,
        max_bytes=max_bytes,
        max_record_bytes=max_record_bytes,
        skips=skips,
        on_bytes=on_bytes,
        faults=faults,
    ):
        num_documents += 1
        yield document
    if num_documents == 0:
        raise nothing_left(path, skips, faults)


def nothing_left(path: Path, skips: SkipCounts, faults: list[str]) -> DataError:
    """What to say of a corpus none of whose documents can be used; `faults` of whole files go first."""
    return DataError(
        faults[0]
        if faults
        else f"{path}: no document left to train on (skipped: {skips}); give text that can be used"
    )


def read_files(
    files: Iterable[Path],
    text_column: str,
    *,
    skips: SkipCounts,
    faults: list[str],
    max_bytes: int = MAX_DOCUMENT_BYTES,
    max_record_bytes: int = MAX_RECORD_BYTES,
    on_bytes: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[str]:
    """The documents of these files, maybe none. `faults` gets a line for each file that can have no text."""
    for file in files:
        bytes_read, size = 0, _size(file)
        try:
            if size == 0:
                skips[EMPTY] += 1
                continue
            for raw, position in read_texts(
                file, text_column, max_bytes=max_bytes, max_record_bytes=max_record_bytes
            ):
                for document in [raw] if isinstance(raw, Skip) else map(_decode, split_text(raw, max_bytes)):
                    on_bytes(position - bytes_read)
                    bytes_read = position
                    if isinstance(document, Skip):
                        skips[document.reason] += 1
                    else:
                        yield document
        except UnusableFile as fault:
            skips[fault.reason] += 1
            faults.append(str(fault))
        on_bytes(size - bytes_read)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(
            f"{file}: no longer there ({error.strerror}); put it back, or start anew without it"
        ) from None


def _decode(raw: bytes) -> str | Skip:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return Skip(NOT_UTF8)
    if not text or text.isspace():
        return Skip(EMPTY)
    return Skip(HAS_NUL) if "\0" in text else text
