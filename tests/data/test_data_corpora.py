"""Corpora as they are published: names, compressions, tables, links, and what lies beside them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from sip_engine.data.documents import SkipCounts, list_input_files, read_documents
from sip_engine.data.formats import END_OF_TEXT, split_text
from sip_engine.data.inventory import take_inventory
from sip_engine.utils.errors import DataError

TEXTS = [
    "First, with a comma; a semicolon\tand a tab.\nTwo lines.",
    'zweites "Dokument" äöü \U0001f600',
    "third",
]


def lines(texts: list[str] = TEXTS, column: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def table(delimiter: str, texts: list[str] = TEXTS) -> bytes:
    out = io.StringIO(newline="")
    rows = csv.writer(out, delimiter=delimiter)
    rows.writerows([["id", "text", "label"], *([i, text, "x"] for i, text in enumerate(texts))])
    return out.getvalue().encode()


def arrow_stream(texts: list[str] = TEXTS) -> bytes:
    sink = io.BytesIO()
    data = pa.table({"text": texts})
    with pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=2)
    return sink.getvalue()


def feather_file(texts: list[str] = TEXTS) -> bytes:
    sink = io.BytesIO()
    feather.write_feather(pa.table({"text": texts}), sink, compression="zstd")
    return sink.getvalue()


def parquet(column: pa.Array) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": column}), sink)
    return sink.getvalue()


def long_window(data: bytes) -> bytes:
    parameter = zstd.CompressionParameter
    return zstd.compress(data, options={parameter.window_log: 31, parameter.enable_long_distance_matching: 1})


def read(path: Path, **options: int | str) -> tuple[list[str], dict[str, int]]:
    skips = SkipCounts()
    return list(read_documents(path, skips=skips, **options)), dict(skips)  # pyright: ignore[reportArgumentType]


ARRAY = json.dumps([{"text": text} for text in TEXTS])
FORMS: dict[str, bytes] = {
    # JSON, by all its names
    "c4-train.00000-of-01024.json.gz": gzip.compress(lines()),
    "train.json": lines(),
    "array.json": ARRAY.encode(),
    "indented-array.json": json.dumps(json.loads(ARRAY), indent=2).encode(),
    "indented-objects.json": "\n".join(json.dumps(row, indent=2) for row in json.loads(ARRAY)).encode(),
    "field.json": json.dumps({"version": 1, "data": json.loads(ARRAY)}).encode(),
    "columns.json": json.dumps({"id": [1, 2, 3], "text": TEXTS}).encode(),
    "pandas.json": json.dumps({"text": dict(enumerate(TEXTS))}, indent=1).encode(),
    "array.jsonl": ARRAY.encode(),
    "mark.json": b"\xef\xbb\xbf" + ARRAY.encode(),
    "x.ndjson": lines(),
    "x.ndjson.xz": lzma.compress(lines()),
    "x.jsonl.bz2": bz2.compress(lines()),
    "X.JSON.ZST": zstd.compress(lines()),
    # compressed, and nothing else said
    "RC_2012-01.zst": zstd.compress(lines()),
    "part-00000.c000.json.zstd": zstd.compress(lines()),
    "a.jsonl.gzip": gzip.compress(lines()),
    "RC_2012-01.xz": lzma.compress(lines()),
    "part-00000.gz": gzip.compress(lines()),
    "dump-v1.5.bz2": bz2.compress(lines()),
    "RS_2008.zst": long_window(lines()),
    # zstd with unusual settings
    "long.jsonl.zst": long_window(lines()),
    "frames.jsonl.zst": long_window(lines(TEXTS[:1])) + zstd.compress(lines(TEXTS[1:])),
    "skippable.jsonl.zst": b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstd.compress(lines()),
    "long.txt.zst": long_window(TEXTS[0].encode()),
    "ultra.csv.zst": zstd.compress(table(","), level=22),
    # tables
    "train.csv": table(","),
    "semicolons.csv": table(";"),
    "train.tsv": table("\t"),
    "bars.csv.gz": gzip.compress(table("|")),
    "mark.csv": b"\xef\xbb\xbf" + table(","),
    "data-00000-of-00001.arrow": arrow_stream(),
    "file.arrow": feather_file(),
    "file.feather": feather_file(),
    "strings.parquet": parquet(pa.array(TEXTS)),
    "large.parquet": parquet(pa.array(TEXTS, pa.large_string())),
    "bytes.parquet": parquet(pa.array([text.encode() for text in TEXTS])),
    "large-bytes.parquet": parquet(pa.array([text.encode() for text in TEXTS], pa.large_binary())),
    "dictionary.parquet": parquet(pa.array(TEXTS).dictionary_encode()),
    "bytes-dictionary.parquet": parquet(pa.array([text.encode() for text in TEXTS]).dictionary_encode()),
}


@pytest.mark.parametrize("name", list(FORMS))
def test_every_published_form_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    expected = TEXTS[:1] if ".txt" in name else TEXTS
    assert read(tmp_path / name) == (expected, {})
    assert read(tmp_path) == (expected, {})


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view()])
def test_arrow_views_are_text(tmp_path: Path, kind: pa.DataType) -> None:
    data = pa.table({"text": pa.array([text.encode() for text in TEXTS], pa.binary()).cast(kind)})
    with pa.ipc.new_stream(tmp_path / "a.arrow", data.schema) as writer:
        writer.write_table(data)
    assert read(tmp_path) == (TEXTS, {})


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize(
    ("files", "passed_over"),
    [
        (
            {"data/train.parquet": FORMS["strings.parquet"], "README.md": "card", "LICENSE.txt": "may"},
            {"card or licence": 2},
        ),
        (
            {"documents/cc.json.gz": FORMS["c4-train.00000-of-01024.json.gz"], "README.md": "card"},
            {"card or licence": 1},
        ),
        (
            {"a.arrow": arrow_stream(), "dataset_info.json": "{}", "state.json": "{}", "LICENSE": "may"},
            {"data set's metadata": 2, "card or licence": 1},
        ),
        ({"x.jsonl": lines(), "README_zh-CN.md": "card", "Licence-CC-BY.rst": "may"}, {"card or licence": 2}),
        (
            {"x.jsonl": lines(), "dataset_card.md": "card", "CITATION.txt": "cite", "plot.png": "\x89"},
            {"card or licence": 2, ".png": 1},
        ),
        (
            {"x.csv": table(","), "sub/readme.TXT": "card", "sub/x.bin": "", "sub/data.tar.gz": "tar"},
            {"card or licence": 1, ".bin": 1, ".gz": 1},
        ),
    ],
)
def test_what_lies_beside_the_documents_is_left_out_and_counted(
    tmp_path: Path, files: dict[str, bytes | str], passed_over: dict[str, int]
) -> None:
    put(tmp_path, files)
    assert read(tmp_path) == (TEXTS, {})
    inventory = take_inventory(tmp_path)
    assert dict(inventory.passed_over) == passed_over
    assert sum(inventory.read.values()) == len(inventory.files) == 1


def test_a_card_alone_is_no_corpus_unless_it_is_named(tmp_path: Path) -> None:
    put(tmp_path, {"README.md": "the card"})
    with pytest.raises(DataError, match=r"no readable file .*\(passed over: 1 card or licence\)"):
        read(tmp_path)
    assert read(tmp_path / "README.md") == (["the card"], {})
    put(tmp_path, {"readme-and-more/notes on readme.md": "text"})
    assert read(tmp_path) == (["text"], {})


def test_linked_folders_are_followed_and_each_is_read_once(tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere", {"one/a.jsonl": lines(["1"]), "two/b.jsonl": lines(["2"])})
    corpus = put(tmp_path / "corpus", {"own/c.jsonl": lines(["3"]), "as-git-has-it": "../elsewhere/two"})
    os.symlink(elsewhere / "one", corpus / "linked")
    os.symlink(corpus, corpus / "own" / "circle")
    os.symlink(corpus / "own", corpus / "again")
    os.symlink(tmp_path / "nowhere", corpus / "broken.jsonl")
    os.symlink(
        elsewhere / "one" / "a.jsonl", corpus / "z.jsonl"
    )  # as in a hub's cache: a file by another name
    assert read(corpus) == (["2", "1", "3", "1"], {})
    inventory = take_inventory(corpus)
    assert inventory.names == ["as-git-has-it/b.jsonl", "linked/a.jsonl", "own/c.jsonl", "z.jsonl"]
    assert dict(inventory.passed_over) == {"folder linked twice": 2, "broken link": 1}


@pytest.mark.parametrize("bad", ["first", "middle", "last"])
def test_a_shard_without_texts_is_skipped_wherever_it_stands(tmp_path: Path, bad: str) -> None:
    place = {"first": "0", "middle": "b", "last": "z"}[bad]
    put(tmp_path, {"a.jsonl": lines(["1"]), "c.parquet": parquet(pa.array(["2"]))})
    put(
        tmp_path / place,
        {
            "numbers.parquet": parquet(pa.array([1, 2])),
            "nulls.parquet": parquet(pa.array([None, None])),
            "other.jsonl": lines(["x"], "content"),
            "other.csv": "id,content\n1,x\n",
            "empty.parquet": b"",
        },
    )
    skips = {
        "file whose column is no text": 1,
        "text not a string": 2,
        "file without the text column": 2,
        "empty": 1,
    }
    assert read(tmp_path) == (["1", "2"], skips)


def test_bad_records_are_skipped_wherever_they_stand(tmp_path: Path) -> None:
    other = json.dumps({"content": "x"}).encode() + b"\n"
    put(tmp_path, {"a.jsonl": other * 3 + lines(["1"]) + other, "b.csv": b'text,n\ncaf\xe9,1\n,2\nb,3\n"c'})
    assert read(tmp_path) == (["1", "b", "c"], {"no text column": 4, "not UTF-8": 1, "empty": 1})


def test_a_column_that_a_thousand_records_lack_is_given_up(tmp_path: Path) -> None:
    path = put(tmp_path, {"a.jsonl": lines(["x"] * 1000, "content") + lines(["1"])}) / "a.jsonl"
    with pytest.raises(DataError, match=r"no column 'text' \(columns: id, content\)"):
        read(path)
    put(tmp_path, {"a.jsonl": lines(["x"] * 999, "content") + lines(["1"])})
    assert read(path) == (["1"], {"no text column": 999})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ARRAY.encode()[:-9]),
        ("a.json.gz", gzip.compress(lines())[:-9]),
        ("a.csv.zst", zstd.compress(table(",") * 99)[:-9]),
        ("a.txt.xz", lzma.compress(TEXTS[0].encode())[:-9]),
        ("a.zst", long_window(lines())[:-9]),
        ("a.bz2", bz2.compress(lines())[:-9]),
        ("a.arrow", arrow_stream()[:-40]),
        ("a.parquet", FORMS["strings.parquet"][:-9]),
        ("a.jsonl.gz", b"not compressed at all"),
    ],
)
def test_cut_off_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    put(tmp_path, {name: content, "whole.jsonl": lines()})
    with pytest.raises(DataError) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}: damaged or unreadable (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("is_open", [False, True])
def test_a_shard_that_vanishes_is_named(tmp_path: Path, is_open: bool) -> None:
    put(tmp_path, {"a.jsonl": lines(), "b.jsonl": lines()})
    documents = read_documents(tmp_path)
    if is_open:
        next(documents)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b\.jsonl: no longer there"):
        list(documents)


def test_a_text_file_is_parted_at_its_marks(tmp_path: Path) -> None:
    stories = f"Once.\n{END_OF_TEXT.decode()}\nTwice,\n\nand on.\n{END_OF_TEXT.decode()}\n"
    put(tmp_path, {"a.txt": stories, "b.txt.gz": gzip.compress(b"One<|endoftext|>Two")})
    assert read(tmp_path) == (["Once.", "Twice,\n\nand on.", "One", "Two"], {})


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.txt.zst", "a.csv"])
def test_a_document_over_the_limit_is_parted_at_lines(tmp_path: Path, name: str) -> None:
    text = "".join(f"line {number} ä\n" for number in range(400))
    forms: dict[str, Callable[[], bytes]] = {
        "a.txt": text.encode,
        "a.txt.zst": lambda: zstd.compress(text.encode()),
        "a.jsonl": lambda: lines([text]),
        "a.parquet": lambda: parquet(pa.array([text])),
        "a.csv": lambda: table(",", [text]),
    }
    put(tmp_path, {name: forms[name]()})
    pieces, skips = read(tmp_path, max_bytes=500)
    assert "".join(pieces) == text and skips == {}
    assert all(len(piece.encode()) <= 500 and piece.endswith("\n") for piece in pieces)
    assert len(pieces) <= len(text.encode()) // 480 + 1


@given(text=st.text(alphabet="aä漢\U0001f600 \n", max_size=80), limit=st.integers(4, 20))
def test_pieces_are_whole_characters_and_nothing_is_lost(text: str, limit: int) -> None:
    pieces = split_text(text.encode(), limit)
    assert "".join(piece.decode() for piece in pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


def test_thousands_of_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"{number:05d}.jsonl").write_bytes(lines([str(number)]))
    assert read(tmp_path)[0] == [str(number) for number in range(2000)]
    assert len(list_input_files(tmp_path)) == 2000
