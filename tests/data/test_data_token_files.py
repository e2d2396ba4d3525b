"""Token files hold exactly the tokens of the text, and the cache never gives another text's files."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from sip_engine.data.build import Work, build_token_files
from sip_engine.data.token_files import TokenFiles
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.utils.errors import DataError

TEXTS = ["the cat sat on the mat\n", "a", "the dog \u2581 sat on the log, äöü \U0001f600 " * 9]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.train(TEXTS, 300, tmp_path_factory.mktemp("tokenizer") / "bpe.model")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": text, "title": f"title {number}"} for number, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": " ", "title": "last"}]))
    return path


@pytest.fixture(scope="module")
def opened(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenFiles:
    folder = tmp_path_factory.mktemp("opened")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return build_token_files(folder, tokenizer, folder / "cache")


def expected_documents(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [[tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in texts]


def all_documents(files: TokenFiles) -> list[list[int]]:
    return [files.tokens(document).tolist() for document in range(files.num_documents)]


def entries(cache: Path) -> list[str]:
    """Names of what is in the cache, as it seems whole or on its way: corpora, then shards."""
    found = [path for folder in (cache, cache / "shards") if folder.is_dir() for path in folder.iterdir()]
    return sorted(path.name for path in found if path.name not in ("identities", "shards"))


def entries_of(files: TokenFiles) -> list[str]:
    return sorted([files.key, *(prefix.parent.name for prefix in files.prefixes)])


def forbid_tokenizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the text was tokenized again")

    monkeypatch.setattr(Tokenizer, "encode_batch", refuse)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, np.uint16), (70_000, np.int32)])
def test_files_hold_every_document_between_bos_and_eos(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path, vocab_size: int, dtype: type[np.number]
) -> None:
    wide = Tokenizer(tokenizer.model)
    wide.vocab_size = vocab_size
    files = build_token_files(corpus, wide, tmp_path / "cache")
    expected = expected_documents(tokenizer, TEXTS)
    assert all_documents(files) == expected
    assert all(files.tokens(document).dtype == np.int32 for document in range(3))
    assert files.lengths.tolist() == [len(document) for document in expected]
    assert (files.num_documents, files.num_tokens) == (3, sum(map(len, expected)))
    assert dict(files.skips) == {"empty": 1}
    assert files.tokenizer_fingerprint == tokenizer.fingerprint

    dataset = IndexedDataset(str(files.prefixes[0]))
    assert [dataset[number].tolist() for number in range(len(dataset))] == expected  # pyright: ignore
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert dataset.index.dtype == dtype


@given(document=st.integers(0, 2), bounds=st.tuples(st.integers(0, 400), st.integers(0, 400)))
def test_any_part_of_a_document_can_be_read(
    opened: TokenFiles, tokenizer: Tokenizer, document: int, bounds: tuple[int, int]
) -> None:
    expected = expected_documents(tokenizer, TEXTS)[document]
    start, stop = sorted(min(bound, len(expected)) for bound in bounds)
    assert opened.tokens(document, start, stop).tolist() == expected[start:stop]
    assert opened.tokens(document, start).tolist() == expected[start:]


@pytest.mark.parametrize(
    ("document", "start", "stop"), [(3, 0, 1), (-1, 0, 1), (1, 0, 4), (1, -1, 2), (1, 2, 1)]
)
def test_reading_outside_a_document_is_refused(
    opened: TokenFiles, document: int, start: int, stop: int
) -> None:
    assert opened.lengths[1] == 3
    with pytest.raises(IndexError):
        opened.tokens(document, start, stop)


def test_what_is_read_is_a_copy(opened: TokenFiles) -> None:
    before = opened.tokens(0).copy()
    opened.tokens(0)[:] = 0
    assert opened.tokens(0).tolist() == before.tolist()


def test_the_second_call_opens_the_files_of_the_first(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_token_files(corpus, tokenizer, tmp_path / "cache")
    expected = expected_documents(tokenizer, TEXTS)
    forbid_tokenizing(monkeypatch)
    os.utime(corpus, (1, 1))
    moved = tmp_path / "elsewhere" / corpus.name
    moved.parent.mkdir()
    corpus.rename(moved)
    second = build_token_files(moved, tokenizer, tmp_path / "cache")
    assert second == first == TokenFiles.open(first.prefix_path)
    assert all_documents(second) == expected
    assert entries(tmp_path / "cache") == entries_of(first)


def test_changed_content_of_the_same_size_and_time_is_tokenized_again(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path
) -> None:
    first = build_token_files(corpus, tokenizer, tmp_path / "cache")
    before = corpus.stat()
    corpus.write_bytes(corpus.read_bytes().replace(b"the cat", b"one cat"))
    os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = corpus.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = build_token_files(corpus, tokenizer, tmp_path / "cache")
    assert second.key != first.key
    assert all_documents(second)[0] == expected_documents(tokenizer, ["one cat sat on the mat\n"])[0]


def test_every_rule_of_reading_has_its_own_files(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    other = Tokenizer.train(TEXTS, 290, tmp_path / "other.model")
    first = build_token_files(corpus, tokenizer, cache)
    titles = build_token_files(corpus, tokenizer, cache, "title")
    small = build_token_files(corpus, tokenizer, cache, max_bytes=100)
    assert all_documents(titles)[2] == expected_documents(tokenizer, ["title 2"])[0]
    assert dict(small.skips) == {"empty": 1}
    assert small.num_documents > first.num_documents  # longer ones are parted
    assert len({first.key, titles.key, small.key, build_token_files(corpus, other, cache).key}) == 4
    corpus.rename(corpus.with_name("renamed.jsonl"))
    assert build_token_files(corpus.with_name("renamed.jsonl"), tokenizer, cache).key != first.key


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_damaged_entry_is_refused_and_built_again(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path, suffix: str, damage: Callable[[Path], None]
) -> None:
    cache = tmp_path / "cache"
    files = build_token_files(corpus, tokenizer, cache)
    damage(Path(f"{files.prefixes[0]}{suffix}"))
    with pytest.raises(DataError, match="token files are missing or damaged; build them again"):
        TokenFiles.open(files.prefix_path)
    again = build_token_files(corpus, tokenizer, cache)
    assert all_documents(again) == expected_documents(tokenizer, TEXTS)
    assert entries(cache) == entries_of(files)


def test_a_damaged_input_leaves_nothing_behind(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(gzip.compress(corpus.read_bytes())[:-4])
    with pytest.raises(DataError, match=r"damaged\.jsonl\.gz: damaged or unreadable"):
        build_token_files(damaged, tokenizer, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_an_interruption_leaves_nothing_behind(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        assert len(entries(tmp_path / "cache")) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "encode_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_token_files(corpus, tokenizer, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_is_named(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError) as error:
        build_token_files(corpus, tokenizer, tmp_path / "cache")
    assert str(error.value) == (
        f"{tmp_path / 'cache'}: cannot write token files (Not a directory); free space or name another cache"
    )


def test_many_builders_at_once_give_one_whole_entry(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(8) as pool:
        calls = [
            pool.submit(build_token_files, corpus, tokenizer, tmp_path / "cache", work=Work(quiet=True))
            for _ in range(8)
        ]
        built = [call.result() for call in calls]
    assert all(all_documents(files) == expected_documents(tokenizer, TEXTS) for files in built)
    assert entries(tmp_path / "cache") == entries_of(built[0])


@pytest.mark.parametrize("is_damaged", [False, True])
def test_the_builder_that_comes_second_keeps_a_whole_entry(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    encode_batch = Tokenizer.encode_batch

    def be_overtaken(self: Tokenizer, texts: list[str], num_threads: int) -> list[np.ndarray]:
        monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)
        winner = build_token_files(corpus, self, tmp_path / "cache")
        if is_damaged:
            truncate(Path(f"{winner.prefixes[0]}.bin"))
        return encode_batch(self, texts, num_threads)

    monkeypatch.setattr(Tokenizer, "encode_batch", be_overtaken)
    files = build_token_files(corpus, tokenizer, tmp_path / "cache")
    assert all_documents(files) == expected_documents(tokenizer, TEXTS)
    assert entries(tmp_path / "cache") == entries_of(files)


def test_nothing_is_printed_without_a_terminal(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_token_files(corpus, tokenizer, tmp_path / "cache")
    assert capfd.readouterr() == ("", "")
