"""One table of file formats, by suffix: how each kind of file is opened and its texts are read, one at a time."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ijson
import pyarrow as pa
import pyarrow.parquet as pq
from backports import zstd

from sip_engine.utils.errors import DataError
from sip_engine.utils.regular import open_regular

EMPTY = "empty"
NOT_UTF8 = "not UTF-8"
HAS_NUL = "contains NUL"
TOO_LARGE = "too large"
MALFORMED_JSON = "malformed JSON line"
MALFORMED_CSV = "malformed CSV row"
NOT_TEXT = "text not a string"
NO_TEXT = "no text column"

MAX_RECORD_BYTES = 256 * 2**20
"""Longest JSON line or CSV field that is read."""
END_OF_TEXT = b"<|endoftext|>"
"""Parts documents within one text file."""

_BUFFER_BYTES = 2**20
_ROWS = 64
_FIRST_RECORDS = 1000
_ARRAY = re.compile(rb"\[\s*[{\]]")


@dataclass(frozen=True)
class Skip:
    """Stands in for a document that cannot be used."""

    reason: str


class UnusableFile(Exception):
    """No text can come from this file; another one may have some. `reason` is what it is counted as."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Source:
    """An open file: `stream` gives its content without compression, `position` the bytes read of the file itself."""

    file: Path
    stream: io.BufferedReader
    position: Callable[[], int]
    text_column: str
    max_record_bytes: int
    max_bytes: int


Record = tuple[bytes | Skip, int]
"""A document's raw text, and how many bytes of its file have been read so far."""
_Reader = Callable[[Source], Iterator[Record]]


def read_texts(
    file: Path, text_column: str, *, max_bytes: int, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[Record]:
    """The raw texts of a file whose name `kind_of` knows.

    max_bytes: a text file is read in pieces of at most this size.
    max_record_bytes: a longer JSON line is skipped, and never held in memory.

    Raises:
        DataError: damaged, cut off, or gone while it is read; UnusableFile: without a column of texts.
    """
    kind = kind_of(file.name)
    assert kind is not None
    with _damage_is_data_error(file), open_regular(file, buffering=0) as raw:
        opened = _DECOMPRESSORS[kind.compression](raw)
        stream = io.BufferedReader(opened, _BUFFER_BYTES)  # pyright: ignore[reportArgumentType]
        yield from kind.reader(Source(file, stream, raw.tell, text_column, max_record_bytes, max_bytes))


@contextmanager
def _damage_is_data_error(file: Path) -> Iterator[None]:
    damage = (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        zstd.ZstdError,
        pa.ArrowException,
        ijson.JSONError,
    )
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{file}: no longer there; put it back, or start anew without it") from None
    except damage as error:
        cause = " ".join(str(error).split())
        raise DataError(f"{file}: damaged or unreadable ({cause}); replace or remove the file") from error


def _text_documents(source: Source) -> Iterator[Record]:
    """A whole file, or what stands between its end-of-text marks; never more at once than `max_bytes`."""
    buffer, scanned, marked = source.stream.read(_BUFFER_BYTES).removeprefix(codecs.BOM_UTF8), 0, False
    is_end = False
    while not is_end or buffer:
        found = buffer.find(END_OF_TEXT, scanned)
        if found >= 0:
            piece, buffer, scanned, marked = buffer[:found], buffer[found + len(END_OF_TEXT) :], 0, True
            pieces = split_text(piece, source.max_bytes)
        elif not is_end and len(buffer) <= source.max_bytes + len(END_OF_TEXT):
            scanned = max(0, len(buffer) - len(END_OF_TEXT))
            block = source.stream.read(_BUFFER_BYTES)
            buffer, is_end = buffer + block, not block
            continue
        elif len(buffer) > source.max_bytes:
            end = _piece_end(buffer, source.max_bytes)
            pieces, buffer, scanned = [buffer[:end]], buffer[end:], 0
        else:
            pieces, buffer = [buffer], b""
        for piece in pieces:
            piece = piece.strip(b"\r\n") if marked else piece
            if piece or not marked:
                yield piece, source.position()


def split_text(text: bytes, max_bytes: int) -> list[bytes]:
    """A text in pieces of at most `max_bytes`, which end with a line, else a word, else a character."""
    pieces = []
    while len(text) > max_bytes:
        end = _piece_end(text, max_bytes)
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text] if text or not pieces else pieces


def _piece_end(text: bytes, max_bytes: int) -> int:
    for mark in (b"\n", b" "):
        if end := text.rfind(mark, 0, max_bytes) + 1:
            return end
    end = max_bytes
    while end > max(1, max_bytes - 3) and text[end] & 0xC0 == 0x80:  # inside a character of UTF-8
        end -= 1
    return end


def _json_lines(source: Source) -> Iterator[Record]:
    """An object a line; or an array of objects, whatever the file is called."""
    yield from _json(source, is_one_value=False)


def _json_file(source: Source) -> Iterator[Record]:
    """As `_json_lines`; also objects over several lines, tables under one key, and columns."""
    yield from _json(source, is_one_value=True)


def _json(source: Source, is_one_value: bool) -> Iterator[Record]:
    stream = source.stream
    if stream.peek(3).startswith(codecs.BOM_UTF8):
        stream.read(3)
    head = stream.peek(_BUFFER_BYTES).lstrip()
    first_line = head.partition(b"\n")[0].rstrip()
    if _ARRAY.match(head):
        records: Iterator[Any] = ijson.items(stream, "item", use_float=True)
    elif is_one_value and b"\n" in head and first_line.endswith((b"{", b"[", b",")):
        records = ijson.items(stream, "", multiple_values=True, use_float=True)
    else:
        records = _parsed_lines(source)
    yield from _texts_of(source, records, is_one_value)


def _parsed_lines(source: Source) -> Iterator[dict[str, Any] | Skip]:
    for line in _lines(source.stream, source.max_record_bytes):
        if line is None:
            yield Skip(TOO_LARGE)
        elif line.strip():
            yield _parse_json_object(line)


def _lines(stream: io.BufferedReader, max_bytes: int) -> Iterator[bytes | None]:
    """Lines of a stream; None for one longer than `max_bytes`, which is never held in memory."""
    while line := stream.readline(max_bytes + 1):
        is_too_long = len(line) > max_bytes and not line.endswith(b"\n")
        yield None if is_too_long else line
        while is_too_long and (rest := stream.readline(_BUFFER_BYTES)):
            is_too_long = not rest.endswith(b"\n")


def _parse_json_object(line: bytes) -> dict[str, Any] | Skip:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Skip(NOT_UTF8)
    except (ValueError, RecursionError):
        return Skip(MALFORMED_JSON)
    return record if isinstance(record, dict) else Skip(MALFORMED_JSON)


def _texts_of(source: Source, records: Iterator[Any], is_one_value: bool) -> Iterator[Record]:
    """Texts of objects. A column that none of the first thousand has is no column of this file."""
    column, first, num_without, is_found = source.text_column, None, 0, False
    for record in records:
        if not isinstance(record, dict):
            yield (record if isinstance(record, Skip) else Skip(MALFORMED_JSON)), source.position()
            continue
        values = _values(record, column) if is_one_value else [record[column]] if column in record else []
        if not values:
            first, num_without = first or list(record), num_without + 1
            if not is_found and num_without == _FIRST_RECORDS:
                break
        is_found = is_found or bool(values)
        if is_found:
            yield from ((Skip(NO_TEXT), source.position()) for _ in range(num_without))
            yield from ((_json_text(value), source.position()) for value in values)
            num_without = 0
    if num_without:
        _check_column(source, first or [])


def _values(record: dict[str, Any], column: str) -> list[Any]:
    """The texts of an object: one, a column of many, or those of the objects that one of its keys holds."""
    if column in record:
        value = record[column]
        return (
            list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        )
    tables = [value for value in record.values() if isinstance(value, list)]
    return [row[column] for table in tables for row in table if isinstance(row, dict) and column in row]


def _json_text(text: Any) -> bytes | Skip:
    if not isinstance(text, str):
        return Skip(NOT_TEXT)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, written as a JSON escape
        return Skip(NOT_UTF8)


def _comma_separated(source: Source) -> Iterator[Record]:
    """Rows under a line of names; parted by a comma, or by what shows the text column in that line."""
    csv.field_size_limit(source.max_record_bytes)
    # What is not UTF-8 is kept, so that it spoils its own row only.
    text = io.TextIOWrapper(source.stream, "utf-8-sig", errors="surrogateescape", newline="")
    header = text.readline()
    if not header:
        return
    parted = {mark: next(csv.reader([header], delimiter=mark), []) for mark in ",\t;|"}
    delimiter = next((mark for mark, names in parted.items() if source.text_column in names), ",")
    _check_column(source, parted[delimiter])
    column, rows = parted[delimiter].index(source.text_column), csv.reader(text, delimiter=delimiter)
    while True:
        try:
            row = next(rows, None)
        except csv.Error:
            yield Skip(MALFORMED_CSV), source.position()
            continue
        if row is None:
            return
        if row:
            raw = row[column].encode(errors="surrogateescape") if column < len(row) else Skip(NO_TEXT)
            yield raw, source.position()


def _parquet(source: Source) -> Iterator[Record]:
    size = source.file.stat().st_size
    with pq.ParquetFile(source.file, page_checksum_verification=True) as parquet:
        _check_text(source, parquet.schema_arrow)
        for group in range(parquet.num_row_groups):
            position = size * (group + 1) // parquet.num_row_groups
            for batch in parquet.iter_batches(_ROWS, row_groups=[group], columns=[source.text_column]):
                yield from ((raw, position) for raw in _column_texts(batch.column(0)))


def _arrow(source: Source) -> Iterator[Record]:
    """Arrow's stream (as `datasets` saves) or file (Feather)."""
    is_file = source.stream.peek(6).startswith(b"ARROW1")
    with (
        pa.OSFile(str(source.file)) as file,
        (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file) as reader,
    ):
        _check_text(source, reader.schema)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            texts = batch.column(reader.schema.get_field_index(source.text_column))
            for start in range(0, len(texts), _ROWS):
                yield from ((raw, file.tell()) for raw in _column_texts(texts.slice(start, _ROWS)))


def _column_texts(column: Any) -> Iterator[bytes | Skip]:
    """Texts of an Arrow array as bytes, so that one that is not UTF-8 is a bad document and not an exception."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    for value in column.cast(pa.large_binary()):
        raw = value.as_py()
        yield Skip(NOT_TEXT) if raw is None else raw


def _check_text(source: Source, schema: pa.Schema) -> None:
    _check_column(source, schema.names)
    column = kind = schema.field(source.text_column).type
    while isinstance(kind, pa.BaseExtensionType | pa.DictionaryType):
        kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind.storage_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
    tests = (*tests, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
    if not any(is_text(kind) for is_text in tests):
        raise UnusableFile(
            "file whose column is no text",
            f"{source.file}: column '{source.text_column}' holds {column}, not text; name another text column",
        )


def _check_column(source: Source, columns: list[str]) -> None:
    if source.text_column not in columns:
        present = ", ".join(columns) or "none"
        raise UnusableFile(
            "file without the text column",
            f"{source.file}: no column '{source.text_column}' (columns: {present}); set the text column to one of "
            "these",
        )


def _unzstd(raw: IO[bytes]) -> IO[bytes]:
    # Windows up to the format's largest, which `zstd --long=31` makes; a file says how much it needs.
    file: Any = zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: 31})
    return file


_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".gzip": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": _unzstd,
    ".zstd": _unzstd,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
_TEXT_READERS: dict[str, _Reader] = {
    ".txt": _text_documents,
    ".text": _text_documents,
    ".md": _text_documents,
    ".rst": _text_documents,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": _comma_separated,
    ".tsv": _comma_separated,
}
"""These may be compressed."""
_TABLE_READERS: dict[str, _Reader] = {".parquet": _parquet, ".arrow": _arrow, ".feather": _arrow}
PLAIN_TEXT = (".txt", ".text", ".md", ".rst")
KNOWN = f"{', '.join((*_TEXT_READERS, *_TABLE_READERS))} ({', '.join(filter(None, _DECOMPRESSORS))} too)"


@dataclass(frozen=True)
class Kind:
    """How a file of a certain name is read."""

    suffix: str
    """Of its content."""
    compression: str
    """Suffix of its compression, or nothing."""
    reader: _Reader

    @property
    def name(self) -> str:
        """Both suffixes, as a user calls the kind."""
        return self.suffix + self.compression


def kind_of(name: str) -> Kind | None:
    """How a file of this name is read; None for one that is no text.

    A compressed file without a suffix of its own (`RC_2012-01.zst`) holds JSON lines, as Pushshift's do.
    """
    name = name.lower()
    compression = next((suffix for suffix in _DECOMPRESSORS if suffix and name.endswith(suffix)), "")
    stem = name.removesuffix(compression)
    suffix = Path(stem).suffix
    if not compression and suffix in _TABLE_READERS:
        return Kind(suffix, "", _TABLE_READERS[suffix])
    if suffix in _TEXT_READERS:
        return Kind(suffix, compression, _TEXT_READERS[suffix])
    has_no_suffix = not suffix[1:].isalpha()  # such as ".5" of "dump-v1.5"
    return Kind("", compression, _json_lines) if compression and has_no_suffix else None
