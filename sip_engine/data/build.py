"""Token files of a corpus, made where they are not yet: which files are known, which are to be tokenized, by whom."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sip_engine.data.documents import MAX_DOCUMENT_BYTES, SkipCounts, nothing_left
from sip_engine.data.formats import kind_of
from sip_engine.data.identity import Identities, total_bytes
from sip_engine.data.inventory import take_inventory
from sip_engine.data.shards import Shard, tokenize_shards
from sip_engine.data.token_files import SHARDS, TokenFiles, is_whole, read_manifest, write_manifest
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import atomic_folder
from sip_engine.utils.progress import transfer

FORMAT_VERSION = 1
"""Part of all keys: raise it when the same input would give other tokens."""


@dataclass(frozen=True)
class Work:
    """How token files are made; none of it changes them."""

    jobs: int | None = None
    """Processes at once; None: one a core, where there is work enough for them."""
    verify: bool = False
    """Read all input, to see that what is remembered of it still holds."""
    quiet: bool = False


@dataclass(frozen=True)
class PartDone:
    """What there is of a corpus after one part of the work on it."""

    num_mine: int
    num_tokenized: int
    """Of mine, those that had no token files before."""
    num_files: int
    """Of the corpus."""


def build_token_files(
    path: str | Path,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    text_column: str = "text",
    *,
    max_bytes: int = MAX_DOCUMENT_BYTES,
    work: Work = Work(),  # frozen
) -> TokenFiles:
    """Tokenizes the text under `path` into `cache_dir`, or opens the files of an earlier call.

    The cache is keyed by content: the tokenizer, the reading rules and a SHA-256 of every input file, which is
    remembered (see `Identities`). Each file has token files of its own, so that work that was broken off goes on with
    those that lack. A damaged entry is built again. Entries appear by a rename, so several processes may build the
    same one, and a crash leaves none that is not whole. Call it on one rank and `TokenFiles.open` on the others.

    text_column, max_bytes: as in `read_documents`.
    Raises DataError for bad input (see `read_documents`) and for a cache that cannot be written.
    """
    corpus = _Corpus(Path(path), tokenizer, Path(cache_dir), text_column, max_bytes)
    hashes = corpus.identify(corpus.inventory.files, work)
    key = corpus.key(hashes)
    entry = corpus.cache / key
    if not is_whole(entry / "tokens"):  # such as of layout 1, which has no shards
        shards = corpus.shards(corpus.inventory.files, hashes)
        corpus.tokenize(shards, work)
        corpus.write(entry, key, shards)
    return TokenFiles.open(entry / "tokens")


def build_part(
    path: str | Path,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    text_column: str,
    part: tuple[int, int],
    work: Work,
) -> PartDone:
    """As `build_token_files`, of every nth file only: `part` is which, from 0, of how many. Raises DataError."""
    corpus = _Corpus(Path(path), tokenizer, Path(cache_dir), text_column, MAX_DOCUMENT_BYTES)
    mine = corpus.inventory.files[part[0] :: part[1]]
    shards = corpus.shards(mine, corpus.identify(mine, work))
    num_tokenized = corpus.tokenize(shards, work)
    return PartDone(len(mine), num_tokenized, len(corpus.inventory.files))


class _Corpus:
    """The files of a corpus and where their tokens go."""

    def __init__(
        self, path: Path, tokenizer: Tokenizer, cache: Path, text_column: str, max_bytes: int
    ) -> None:
        self.path, self.cache, self.inventory = path, cache, take_inventory(path)
        self._tokenizer, self._text_column, self._max_bytes = tokenizer, text_column, max_bytes
        self._rules = [FORMAT_VERSION, tokenizer.fingerprint, text_column, max_bytes]

    def identify(self, files: Sequence[Path], work: Work) -> list[str]:
        with transfer("checking", total_bytes(files), quiet=work.quiet) as bar, _writing(self.cache):
            identities = Identities(self.cache / "identities", verify=work.verify)
            return identities.of(files, lambda num_bytes: bar.advance(num_bytes))

    def key(self, hashes: Sequence[str]) -> str:
        key = hashlib.sha256(json.dumps(self._rules).encode())
        for name, digest in zip(self.inventory.names, hashes, strict=True):
            key.update(json.dumps([name, digest]).encode())
        return key.hexdigest()

    def shards(self, files: Sequence[Path], hashes: Sequence[str]) -> list[Shard]:
        return [
            Shard(file, self._shard_entry(file, digest), self._text_column, self._max_bytes)
            for file, digest in zip(files, hashes, strict=True)
        ]

    def _shard_entry(self, file: Path, digest: str) -> Path:
        kind = kind_of(file.name)
        assert kind is not None
        key = hashlib.sha256(json.dumps([*self._rules, kind.name, digest]).encode()).hexdigest()
        return self.cache / SHARDS / key

    def tokenize(self, shards: Sequence[Shard], work: Work) -> int:
        """Makes the token files that are not there yet; their number."""
        missing = list({shard.entry: shard for shard in shards if not shard.is_done}.values())
        with (
            transfer("tokenizing", total_bytes([shard.file for shard in missing]), quiet=work.quiet) as bar,
            _writing(self.cache),
        ):
            tokenize_shards(missing, self._tokenizer, work.jobs, bar)
        return len(missing)

    def write(self, entry: Path, key: str, shards: Sequence[Shard]) -> None:
        """The manifest of the corpus. Raises DataError where no document is left."""
        skips, faults, num_documents, num_tokens = SkipCounts(), [], 0, 0
        for shard in shards:
            manifest = read_manifest(shard.entry / "tokens")
            if manifest is None:
                raise DataError(f"{shard.entry}: no longer whole; something removes files of the cache")
            skips.update(manifest["skips"])
            faults += manifest["faults"]
            num_documents += manifest["num_documents"]
            num_tokens += manifest["num_tokens"]
        if num_documents == 0:
            raise nothing_left(self.path, skips, faults)
        facts: dict[str, Any] = {"key": key, "tokenizer": self._tokenizer.fingerprint, "skips": skips}
        facts |= {"num_documents": num_documents, "num_tokens": num_tokens}
        facts[SHARDS] = [shard.entry.name for shard in shards]
        with (
            _writing(self.cache),
            atomic_folder(entry, keep=lambda found: is_whole(found / "tokens")) as folder,
        ):
            write_manifest(folder / "tokens", facts)


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{cache}: cannot write token files ({error.strerror}); free space or name another cache"
        ) from error
