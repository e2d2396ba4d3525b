"""Reads raw text files as a stream of documents and counts the documents it has to skip."""

from __future__ import annotations

import codecs
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from sip_engine.utils.errors import DataError

MAX_DOCUMENT_BYTES = 16 * 2**20
TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSONL_CODECS = {".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
SUFFIXES = (*TEXT_SUFFIXES, *JSONL_CODECS, ".parquet")

EMPTY = "empty"
NOT_UTF8 = "not UTF-8"
HAS_NUL = "contains NUL"
TOO_LARGE = "too large"
MALFORMED_JSON = "malformed JSON line"
NOT_TEXT = "text not a string"
NO_TEXT = "no text column"

_BUFFER_BYTES = 2**20
_PARQUET_ROWS = 64


class SkipCounts(Counter[str]):
    """Number of skipped documents by reason."""

    def __str__(self) -> str:
        """For example `3 empty, 1 not UTF-8`."""
        return ", ".join(f"{count} {reason}" for reason, count in self.most_common()) or "none"


@dataclass(frozen=True)
class _Skip:
    """Stands in for a document that cannot be used."""

    reason: str


_Record = tuple[bytes | _Skip, int]
"""A document's raw text, and how many bytes of its file have been read so far."""


def list_input_files(path: str | Path) -> list[Path]:
    """The files that `read_documents(path)` reads, in its order.

    A directory is searched recursively and sorted by relative path; hidden files and folders are
    left out. Raises DataError if nothing there can be read.
    """
    path = Path(path)
    known = ", ".join(SUFFIXES)
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file; give a directory or one of {known}")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or directory; give the path of the training text")
    relative = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    files = [path / name for name in relative if _is_visible(name) and name.lower().endswith(SUFFIXES)]
    if not files:
        raise DataError(f"{path}: no readable file in this directory; put files of kind {known} there")
    return files


def read_documents(
    path: str | Path,
    text_column: str = "text",
    *,
    max_bytes: int = MAX_DOCUMENT_BYTES,
    skips: SkipCounts | None = None,
    on_bytes: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[str]:
    """Yields the documents under `path`, one at a time, unchanged.

    path: a directory, or one file. A .txt, .md or .rst file is one document; .jsonl (also .gz and
        .zst) holds one in each line, .parquet one in each row, in `text_column`.
    max_bytes: a larger document (for JSON its whole line) is skipped; only parquet has to load it first.
    skips: filled while iterating with what had to be skipped, by reason.
    on_bytes: called with the number of input bytes read since its last call, for a progress bar.

    Raises DataError at once if there is nothing to read, and while iterating if a file is damaged, a
    text column is missing, or no document is left in the end.
    """
    skips = SkipCounts() if skips is None else skips
    return _read(Path(path), list_input_files(path), text_column, max_bytes, skips, on_bytes)


def _read(
    path: Path,
    files: list[Path],
    text_column: str,
    max_bytes: int,
    skips: SkipCounts,
    on_bytes: Callable[[int], object],
) -> Iterator[str]:
    num_documents = 0
    for file in files:
        bytes_read = 0
        for raw, position in _records(file, text_column, max_bytes):
            document = raw if isinstance(raw, _Skip) else _decode(raw, max_bytes)
            on_bytes(position - bytes_read)
            bytes_read = position
            if isinstance(document, _Skip):
                skips[document.reason] += 1
            else:
                num_documents += 1
                yield document
    if num_documents == 0:
        raise DataError(
            f"{path}: no document left to train on (skipped: {skips}); give text that can be used"
        )


def _decode(raw: bytes, max_bytes: int) -> str | _Skip:
    if len(raw) > max_bytes:
        return _Skip(TOO_LARGE)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return _Skip(NOT_UTF8)
    if not text or text.isspace():
        return _Skip(EMPTY)
    return _Skip(HAS_NUL) if "\0" in text else text


def _records(file: Path, text_column: str, max_bytes: int) -> Iterator[_Record]:
    name = file.name.lower()
    with _damage_is_data_error(file):
        if name.endswith(TEXT_SUFFIXES):
            yield _text_record(file, max_bytes)
        elif name.endswith(".parquet"):
            yield from _parquet_records(file, text_column)
        else:
            codec = next(codec for suffix, codec in JSONL_CODECS.items() if name.endswith(suffix))
            yield from _jsonl_records(file, text_column, max_bytes, codec)


@contextmanager
def _damage_is_data_error(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        cause = " ".join(str(error).split())
        raise DataError(f"{file}: damaged or unreadable ({cause}); replace or remove the file") from error


def _text_record(file: Path, max_bytes: int) -> _Record:
    size = file.stat().st_size
    if size > max_bytes:
        return _Skip(TOO_LARGE), size
    return file.read_bytes().removeprefix(codecs.BOM_UTF8), size


def _jsonl_records(file: Path, text_column: str, max_bytes: int, codec: str | None) -> Iterator[_Record]:
    is_first_object = True
    with pa.OSFile(str(file)) as source:
        stream = pa.CompressedInputStream(source, codec) if codec else source
        for line in _lines(io.BufferedReader(stream, _BUFFER_BYTES), max_bytes):  # pyright: ignore[reportArgumentType]
            if line is None:
                yield _Skip(TOO_LARGE), source.tell()
                continue
            if not line.strip():
                continue
            record = _parse_json_object(line)
            if is_first_object and isinstance(record, dict):
                is_first_object = False
                _check_column(file, text_column, list(record))
            text = _json_text(record, text_column) if isinstance(record, dict) else record
            yield text, source.tell()


def _lines(stream: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Lines of a stream; None for one longer than `max_bytes`, which is never held in memory."""
    line = stream.readline(max_bytes + 1).removeprefix(codecs.BOM_UTF8)
    while line:
        is_too_long = len(line) > max_bytes and not line.endswith(b"\n")
        yield None if is_too_long else line
        while is_too_long and (rest := stream.readline(_BUFFER_BYTES)):
            is_too_long = not rest.endswith(b"\n")
        line = stream.readline(max_bytes + 1)


def _parse_json_object(line: bytes) -> dict[str, object] | _Skip:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return _Skip(NOT_UTF8)
    except (ValueError, RecursionError):
        return _Skip(MALFORMED_JSON)
    return record if isinstance(record, dict) else _Skip(MALFORMED_JSON)


def _json_text(record: dict[str, object], text_column: str) -> bytes | _Skip:
    if text_column not in record:
        return _Skip(NO_TEXT)
    text = record[text_column]
    if not isinstance(text, str):
        return _Skip(NOT_TEXT)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, written as a JSON escape
        return _Skip(NOT_UTF8)


def _parquet_records(file: Path, text_column: str) -> Iterator[_Record]:
    size = file.stat().st_size
    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        schema = parquet.schema_arrow
        _check_column(file, text_column, schema.names)
        kind = schema.field(text_column).type
        if not _is_text(kind):
            raise DataError(
                f"{file}: column '{text_column}' holds {kind}, not text; name another text column"
            )
        for group in range(parquet.num_row_groups):
            position = size * (group + 1) // parquet.num_row_groups
            for batch in parquet.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[text_column]):
                # As bytes, so that a row that is not UTF-8 is one bad document and not an exception.
                for value in batch.column(0).cast(pa.large_binary()):
                    raw = value.as_py()
                    yield (_Skip(NOT_TEXT) if raw is None else raw), position


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _check_column(file: Path, text_column: str, columns: list[str]) -> None:
    if text_column not in columns:
        present = ", ".join(columns) or "none"
        raise DataError(
            f"{file}: no column '{text_column}' (columns: {present}); set the text column to one of these"
        )


def _is_visible(relative: str) -> bool:
    return not any(part.startswith(".") for part in relative.split("/"))
