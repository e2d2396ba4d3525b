"""Token files of many input files: made by many processes or jobs, gone on with, and known again without reading."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sip_engine.cli import app
from sip_engine.data import build, identity, shards
from sip_engine.data.build import Work, build_part, build_token_files
from sip_engine.data.documents import read_documents
from sip_engine.data.indexed import SAMPLE_BYTES, SAMPLES, join
from sip_engine.data.token_files import TokenFiles
from sip_engine.data.tokenize import part_of
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.utils.errors import ConfigError, DataError
from sip_engine.utils.progress import Transfer

TEXT = "the cat sat on the mat and the dog sat on the log while it was raining in the town"
WORDS = TEXT.split()


def write_corpus(folder: Path, num_files: int, documents: int = 40) -> Path:
    rng = np.random.default_rng(num_files)
    folder.mkdir()
    for number in range(num_files):
        rows = [" ".join(rng.choice(WORDS, size=rng.integers(1, 60))) for _ in range(documents)]
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (folder / f"{number:02}.jsonl").write_text(text + "not JSON\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS)] * 9, 290, tmp_path_factory.mktemp("tokenizer") / "bpe.model")


def expected(tokenizer: Tokenizer, path: Path) -> list[list[int]]:
    return [
        [tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id]
        for text in read_documents(path)
    ]


def all_documents(files: TokenFiles) -> list[list[int]]:
    return [files.tokens(document).tolist() for document in range(files.num_documents)]


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of files as they are tokenized."""
    names: list[str] = []
    real = shards._tokenize

    def watched(shard: shards.Shard, *rest: object) -> None:
        names.append(shard.file.name)
        real(shard, *rest)  # pyright: ignore

    monkeypatch.setattr(shards, "_tokenize", watched)
    yield names


@pytest.mark.parametrize("num_files", [1, 17], ids=["one file by all processes", "a file a process"])
def test_processes_write_what_one_writes(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int
) -> None:
    monkeypatch.setattr(shards, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(shards, "_BATCH_CHARS", 500)
    corpus = write_corpus(tmp_path / "corpus", num_files)
    files = build_token_files(corpus, tokenizer, tmp_path / "cache", work=Work(jobs=2, quiet=True))
    assert all_documents(files) == expected(tokenizer, corpus)
    assert files.num_tokens == sum(map(len, all_documents(files)))
    assert dict(files.skips) == {"malformed JSON line": num_files}
    assert len(files.prefixes) == num_files


def test_a_fault_in_a_process_is_its_own_line(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_WORTH_PROCESSES", 0)
    corpus = write_corpus(tmp_path / "corpus", 9)
    (corpus / "03.jsonl.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(DataError, match=r"03\.jsonl\.gz: damaged or unreadable"):
        build_token_files(corpus, tokenizer, tmp_path / "cache", work=Work(jobs=2))


def test_an_interruption_ends_all_processes(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are within a file give it up: the rest is not made, and nothing half-written is left."""
    monkeypatch.setattr(shards, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(shards, "_POLL_SECONDS", 0.01)
    corpus = write_corpus(tmp_path / "corpus", 12, documents=4000)

    class Interrupted(Transfer):
        def advance(self, num_bytes: int) -> None:
            if num_bytes:
                raise KeyboardInterrupt

    def transfer(title: str, total: int, *, quiet: bool) -> nullcontext[Transfer]:
        return nullcontext((Interrupted if title == "tokenizing" else Transfer)(title, total, None, True))

    monkeypatch.setattr(build, "transfer", transfer)
    with pytest.raises(KeyboardInterrupt):
        build_token_files(corpus, tokenizer, tmp_path / "cache", work=Work(jobs=2))
    assert not [child for child in multiprocessing.active_children() if "Spawn" in type(child).__name__]
    made = list((tmp_path / "cache" / "shards").iterdir())
    assert len(made) < 9 and all((entry / "tokens.json").is_file() for entry in made)


def test_work_goes_on_with_the_files_that_lack(
    tokenizer: Tokenizer, tmp_path: Path, tokenized: list[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus", 3)
    whole = (corpus / "01.jsonl").read_bytes()
    (corpus / "01.jsonl").rename(corpus / "01.jsonl.gz")  # which it is not
    with pytest.raises(DataError, match="damaged"):
        build_token_files(corpus, tokenizer, tmp_path / "cache")
    (corpus / "01.jsonl.gz").unlink()
    (corpus / "01.jsonl").write_bytes(whole)
    files = build_token_files(corpus, tokenizer, tmp_path / "cache")
    assert tokenized == ["00.jsonl", "01.jsonl.gz", "01.jsonl", "02.jsonl"]
    assert all_documents(files) == expected(tokenizer, corpus)
    write_corpus(tmp_path / "new", 4)
    (tmp_path / "new" / "03.jsonl").rename(corpus / "00a.jsonl")
    more = build_token_files(corpus, tokenizer, tmp_path / "cache")
    assert tokenized[4:] == ["00a.jsonl"]
    assert all_documents(more) == expected(tokenizer, corpus) and more.key != files.key


def test_parts_of_an_array_make_the_whole(
    tokenizer: Tokenizer, tmp_path: Path, tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus", 5)
    tokenizer.save(tmp_path / "bpe.model")
    (tmp_path / "run.toml").write_text(
        '[data]\npath = "corpus"\ntokenizer = "bpe.model"\n[judge]\nbackend = "heuristic"\n'
    )
    said = ""
    for task in (4, 7, 10):
        numbers = {"ID": task, "MIN": 4, "MAX": 10, "COUNT": 3}
        for name, number in numbers.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(number))
        result = CliRunner().invoke(app, ["data", "tokenize", "run.toml"], catch_exceptions=False)
        assert result.exit_code == 0
        said += result.output
    for number, count in ((1, 2), (2, 2), (3, 1)):
        assert f"corpus: part {number} of 3: {count} of 5 files, {count} of them tokenized now (" in said
    assert tokenized == ["00.jsonl", "03.jsonl", "01.jsonl", "04.jsonl", "02.jsonl"]
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    result = CliRunner().invoke(app, ["data", "tokenize", "run.toml"], catch_exceptions=False)
    files = build_token_files("corpus", tokenizer, "cache")
    assert f"corpus: 200 documents, {files.num_tokens:,} tokens of 5 files; skipped 5" in result.output
    assert len(tokenized) == 5
    assert build_part("corpus", tokenizer, "cache", "text", (1, 2), Work()).num_tokenized == 0


@pytest.mark.parametrize(
    ("given", "environment", "wanted"),
    [
        ("2/3", {"SLURM_ARRAY_TASK_ID": "9"}, (1, 3)),
        ("", {}, None),
        ("", {"ID": "0", "MIN": "0", "MAX": "0", "COUNT": "1"}, (0, 1)),
        ("", {"ID": "12", "MIN": "2", "MAX": "12", "COUNT": "3"}, (2, 3)),
        ("0/3", {}, "--part 0/3: must be I/N"),
        ("4/3", {}, "--part 4/3: must be I/N"),
        ("half", {}, "--part half: must be I/N"),
        ("", {"ID": "5", "MIN": "1", "MAX": "9", "COUNT": "3"}, (1, 3)),
        ("", {"ID": "3", "MIN": "1", "MAX": "9", "COUNT": "3"}, "not evenly spaced"),
        ("", {"ID": "1", "MIN": "1", "MAX": "8", "COUNT": "3"}, "not evenly spaced"),
        ("", {"ID": "1"}, "without MIN, MAX and COUNT"),
    ],
)
def test_which_part_a_job_has(given: str, environment: dict[str, str], wanted: object) -> None:
    full = {name if "_" in name else f"SLURM_ARRAY_TASK_{name}": value for name, value in environment.items()}
    if isinstance(wanted, str):
        with pytest.raises(ConfigError, match=wanted):
            part_of(given, full)
    else:
        assert part_of(given, full) == wanted


def test_a_part_needs_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus", 2)
    (tmp_path / "run.toml").write_text('[data]\npath = "corpus"\n')
    result = CliRunner().invoke(app, ["data", "tokenize", "run.toml", "--part", "1/2"])
    assert isinstance(result.exception, ConfigError) and "set data.tokenizer" in str(result.exception)
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def read_whole(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files as they are hashed whole."""
    names: list[str] = []
    real: Callable[..., str] = identity._sha256

    def watched(file: Path, *rest: object) -> str:
        names.append(file.name)
        return real(file, *rest)

    monkeypatch.setattr(identity, "_sha256", watched)
    return names


def test_what_is_known_is_not_read_again(tokenizer: Tokenizer, tmp_path: Path, read_whole: list[str]) -> None:
    text, cache = tmp_path / "long.txt", tmp_path / "cache"
    size = 2 * SAMPLES * SAMPLE_BYTES
    text.write_bytes(b"the cat sat\n" * (size // 12))
    assert text.stat().st_size > SAMPLES * SAMPLE_BYTES
    first = build_token_files(text, tokenizer, cache)
    assert build_token_files(text, tokenizer, cache) == first
    assert read_whole == ["long.txt"]
    os.utime(text, ns=(1, 1))  # as after a copy
    assert build_token_files(text, tokenizer, cache) == first
    assert build_token_files(text, tokenizer, cache) == first
    assert read_whole == ["long.txt"] * 2

    with text.open("r+b") as file:  # between two samples, and the time put back
        file.seek(SAMPLE_BYTES + 8)
        file.write(b"DOG")
    os.utime(text, ns=(1, 1))
    assert build_token_files(text, tokenizer, cache) == first
    changed = build_token_files(text, tokenizer, cache, work=Work(verify=True))
    assert changed.key != first.key and "DOG" in tokenizer.decode(changed.tokens(0))
    assert read_whole == ["long.txt"] * 3
    with text.open("r+b") as file:  # in a sample
        file.write(b"A")
    os.utime(text, ns=(1, 1))
    assert build_token_files(text, tokenizer, cache).key not in (first.key, changed.key)


def test_a_cache_of_the_first_layout_is_opened(
    tokenizer: Tokenizer, tmp_path: Path, tokenized: list[str]
) -> None:
    corpus, cache = write_corpus(tmp_path / "corpus", 2), tmp_path / "cache"
    files = build_token_files(corpus, tokenizer, tmp_path / "elsewhere")
    tokenized.clear()
    entry = cache / files.key
    entry.mkdir(parents=True)
    join(entry / "tokens", list(files.prefixes), tokenizer.vocab_size)
    sizes = {suffix: os.path.getsize(entry / f"tokens{suffix}") for suffix in (".bin", ".idx")}
    facts = {"num_documents": files.num_documents, "num_tokens": files.num_tokens, "skips": files.skips}
    manifest = {"key": files.key, "tokenizer": tokenizer.fingerprint, **facts, "sizes": sizes}
    (entry / "tokens.json").write_text(json.dumps(manifest))
    old = build_token_files(corpus, tokenizer, cache)
    assert not tokenized and old.prefixes == [entry / "tokens"]
    assert all_documents(old) == all_documents(files)


def test_a_cache_of_a_later_layout_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus, cache = write_corpus(tmp_path / "corpus", 1), tmp_path / "cache"
    files = build_token_files(corpus, tokenizer, cache)
    manifest = Path(f"{files.prefix_path}.json")
    manifest.write_text(manifest.read_text().replace('"layout": 2', '"layout": 3'))
    with pytest.raises(
        DataError, match=r"written by a later version; this one knows 2: name another data\.cache"
    ):
        build_token_files(corpus, tokenizer, cache)


def test_a_cache_that_can_only_be_read_is_enough(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, cache = write_corpus(tmp_path / "corpus", 2), tmp_path / "cache"
    files = build_token_files(corpus, tokenizer, cache)
    os.utime(corpus / "00.jsonl", ns=(1, 1))

    def refuse(path: Path, *_: object) -> None:
        raise DataError(f"{path}: cannot be written")

    monkeypatch.setattr(identity, "write_atomic", refuse)
    assert build_token_files(corpus, tokenizer, cache) == files


def test_more_files_than_may_be_open(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sip_engine.data import token_files

    monkeypatch.setattr(token_files, "_MAPPED_AT_A_TIME", 2)
    corpus = write_corpus(tmp_path / "corpus", 9, documents=1)
    before = len(os.listdir("/proc/self/fd"))
    files = build_token_files(corpus, tokenizer, tmp_path / "cache")
    assert all_documents(files) == expected(tokenizer, corpus)
    assert len(os.listdir("/proc/self/fd")) <= before + 4
