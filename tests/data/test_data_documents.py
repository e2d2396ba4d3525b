"""Reading raw text: every format gives the same documents; every kind of bad input is counted or named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from sip_engine.data.documents import SkipCounts, list_input_files, read_documents
from sip_engine.utils.errors import DataError

TEXTS = ["First document.\nTwo lines.\r\n", "  zweites Dokument, äöü \u2581 \U0001f600\t", "third"]


def jsonl(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path: Path, texts: Sequence[str], **options: Any) -> None:
    ids = pa.array(range(len(texts)))
    pq.write_table(pa.table({"id": ids, "text": pa.array(texts, pa.string())}), path, **options)


def write_as(path: Path, texts: list[str]) -> None:
    writers: dict[str, Callable[[], object]] = {
        ".jsonl": lambda: path.write_bytes(jsonl(texts)),
        ".gz": lambda: path.write_bytes(gzip.compress(jsonl(texts))),
        ".zst": lambda: path.write_bytes(zstd.compress(jsonl(texts))),
        ".parquet": lambda: write_parquet(path, texts),
    }
    writers[path.suffix]()


def read(path: Path, **options: Any) -> tuple[list[str], dict[str, int]]:
    skips = SkipCounts()
    return list(read_documents(path, skips=skips, **options)), dict(skips)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "A.JSONL"])
def test_every_container_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    if name.isupper():
        (tmp_path / name).write_bytes(jsonl(TEXTS))
    else:
        write_as(tmp_path / name, TEXTS)
    assert read(tmp_path / name) == (TEXTS, {})


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst"])
def test_a_text_file_is_one_unchanged_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TEXTS[0].encode())
    assert read(tmp_path / name) == ([TEXTS[0]], {})


def test_a_directory_is_read_in_sorted_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for folder in ("b", "a/deep", ".git", "a/.cache"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("z.txt", "b/1.md", "b/10.md", "b/2.md", "a/deep/x.rst", "a.txt"):
        (tmp_path / name).write_text(name)
    for name in (".git/x.txt", "a/.cache/x.txt", ".hidden.txt", "photo.png", "table.xlsx"):
        (tmp_path / name).write_text("must not be read")
    write_as(tmp_path / "b" / "3.jsonl.gz", ["in 3, first", "in 3, second"])
    expected = [
        "a.txt",
        "a/deep/x.rst",
        "b/1.md",
        "b/10.md",
        "b/2.md",
        "in 3, first",
        "in 3, second",
        "z.txt",
    ]
    assert read(tmp_path) == (expected, {})
    assert len(list_input_files(tmp_path)) == 7


def test_concatenated_compressed_streams_are_read_to_the_end(tmp_path: Path) -> None:
    for name, compress in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd.compress)):
        (tmp_path / name).write_bytes(compress(jsonl(TEXTS[:2])) + compress(jsonl(TEXTS[2:])))
        assert read(tmp_path / name) == (TEXTS, {})


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["world"]))
    assert read(tmp_path) == (["hello", "world"], {})


def test_bad_text_files_are_counted_by_reason(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_bytes(b"12345678")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.md").write_bytes(" \n\t\u2003".encode())
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "binary.rst").write_bytes(b"a\0b")
    skips = {"empty": 2, "not UTF-8": 1, "contains NUL": 1}
    assert read(tmp_path) == (["12345678"], skips)


def test_bad_json_lines_are_counted_by_reason(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"",  # an empty line is no record
        b'{"text": "cut off',
        b'["a list"]',
        b"[" * 100_000,
        b'{"text": 7}',
        b'{"text": null}',
        b'{"other": "x"}',
        b'{"text": "  "}',
        b'{"text": "caf\xe9"}',
        b'{"text": "half a pair \\ud800"}',
        b'{"text": "nul \\u0000"}',
        b'{"text": "' + b"x" * 200_000 + b'"}',
        b'{"text": "good too"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    skips = {
        "malformed JSON line": 3,
        "text not a string": 2,
        "no text column": 1,
        "empty": 1,
        "not UTF-8": 2,
        "contains NUL": 1,
        "too large": 1,
    }
    assert read(tmp_path / "a.jsonl", max_record_bytes=150_000) == (["good", "good too"], skips)


def test_a_line_of_exactly_the_largest_size_is_kept(tmp_path: Path) -> None:
    line = jsonl(["x" * 50]).rstrip(b"\n")
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + line)
    assert read(tmp_path / "a.jsonl", max_record_bytes=len(line)) == (["x" * 50] * 2, {})
    with pytest.raises(DataError, match="2 too large"):
        read(tmp_path / "a.jsonl", max_record_bytes=len(line) - 1)


def test_bad_parquet_rows_are_counted_by_reason(tmp_path: Path) -> None:
    not_utf8 = pa.array([b"good", None, b"", b"caf\xe9", b"a\0b", b"123456789"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(not_utf8), not_utf8.buffers(), null_count=1)
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    skips = {"text not a string": 1, "empty": 1, "not UTF-8": 1, "contains NUL": 1}
    assert read(tmp_path / "a.parquet") == (["good", "123456789"], skips)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda path: path / "none", "no such file or directory; give the path of the training text"),
        (
            lambda path: path,
            "no readable file in this directory (passed over: 1 .pdf); put files of kind .txt, ",
        ),
        (lambda path: path / "a.pdf", "unknown kind of file; give a directory or one of .txt, .text, .md, "),
    ],
)
def test_nothing_to_read_is_named_before_iterating(
    tmp_path: Path, make: Callable[[Path], Path], rule: str
) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError) as error:
        read_documents(make(tmp_path))
    assert str(error.value).startswith(f"{make(tmp_path)}: {rule}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_a_missing_column_is_named_with_the_present_ones(tmp_path: Path, name: str) -> None:
    write_as(tmp_path / name, TEXTS)
    with pytest.raises(DataError) as error:
        read(tmp_path / name, text_column="content")
    assert str(error.value) == (
        f"{tmp_path / name}: no column 'content' (columns: id, text); set the text column to one of these"
    )


def test_a_parquet_column_without_text_is_named_with_its_type(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(DataError, match="column 'id' holds int64, not text; name another text column"):
        read(tmp_path / "a.parquet", text_column="id")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_file_is_an_error_and_no_end(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    write_as(path, [f"document {i} " * 30 for i in range(200)])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: damaged or unreadable (")
    assert str(error.value).endswith("); replace or remove the file")
    assert "\n" not in str(error.value)


def test_a_corpus_without_documents_says_what_was_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ")
    (tmp_path / "b.txt").write_text("\n")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(DataError) as error:
        read(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: no document left to train on (skipped: 2 empty, 1 not UTF-8); "
        "give text that can be used"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_reading_is_lazy_and_reports_all_bytes_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise = [bytes(range(33, 127)).decode() * 20 + str(hash((i, 7)) % 10**9) for i in range(3000)]
    write_as(path, noise) if name == "a.jsonl" else path.write_bytes(
        gzip.compress(jsonl(noise), 0) if name.endswith("gz") else zstd.compress(jsonl(noise), -100)
    )
    seen: list[int] = []
    documents = read_documents(path, on_bytes=seen.append)
    next(documents)
    first = sum(seen)
    assert sum(1 for _ in documents) == 2999
    assert sum(seen) == path.stat().st_size
    assert first <= max(3 * 2**20, path.stat().st_size // 2)


def column_chunk(path: Path, group: int, column: int) -> tuple[int, int]:
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    return start, start + chunk.total_compressed_size


def zero(path: Path, start: int, stop: int) -> None:
    data = bytearray(path.read_bytes())
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


def test_only_the_text_column_of_a_parquet_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS)
    zero(path, *column_chunk(path, 0, 0))
    assert read(path) == (TEXTS, {})


def test_parquet_is_streamed_by_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["one", "two", "three", "four"], row_group_size=2)
    zero(path, *column_chunk(path, 1, 1))
    documents = read_documents(path)
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(DataError, match="damaged or unreadable"):
        next(documents)
