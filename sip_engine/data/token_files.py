"""Tokenized documents on disk, opened: one pair of Megatron's .bin/.idx files for each file of the corpus."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sip_engine.data.documents import SkipCounts
from sip_engine.data.indexed import IndexedTokens, sampled_hash
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.utils.errors import DataError
from sip_engine.utils.regular import open_regular, read_text

LAYOUT = 2
"""Of the cache: 2 has token files for each file of a corpus; 1, which is read as well, one pair for all."""
SHARDS = "shards"
"""Folder of these, in the cache."""
_SUFFIXES = (".bin", ".idx")
_CHECK = "check"
"""Key of a manifest: SHA-256 of the rest of it."""
_MAPPED_AT_A_TIME = 128
"""Pairs of token files: a process may have a thousand files open, and a corpus more."""


@dataclass(frozen=True)
class TokenFiles:
    """Tokenized documents, memory-mapped. Every document is `[bos] + ids + [eos]`."""

    prefix_path: Path
    """The manifest is this path with .json appended; of one pair, so are .bin and .idx."""
    key: str
    """Hash of the input's content, the tokenizer and the reading rules."""
    tokenizer_fingerprint: str | None
    """None of files made elsewhere, which do not say."""
    num_documents: int
    num_tokens: int
    """With bos and eos."""
    skips: SkipCounts
    """Documents of the input that are not in the files, by reason."""
    lengths: np.ndarray = field(repr=False, compare=False)
    """Number of tokens of each document, with bos and eos: [num_documents] int32."""
    prefixes: Sequence[Path] = field(repr=False)
    """Of each pair of .bin and .idx files, its path without these."""
    _part: Callable[[int], IndexedTokens] = field(repr=False, compare=False)
    _ends: Sequence[int] = field(repr=False, compare=False)
    """Documents up to the end of each part."""

    @classmethod
    def open(cls, prefix_path: str | Path) -> TokenFiles:
        """Opens what `build_token_files` wrote. Raises DataError if it is missing, damaged, or of a later version."""
        prefix_path = Path(prefix_path)
        manifest = read_manifest(prefix_path)
        if manifest is None:
            raise DataError(
                f"{prefix_path}: token files are missing or damaged; build them again from the text"
            )
        return cls._of_parts(
            shard_paths(prefix_path, manifest),
            prefix_path=prefix_path,
            key=manifest["key"],
            tokenizer_fingerprint=manifest["tokenizer"],
            num_tokens=manifest["num_tokens"],
            skips=SkipCounts(manifest["skips"]),
        )

    @classmethod
    def open_foreign(cls, prefixes: Sequence[Path], tokenizer: Tokenizer) -> TokenFiles:
        """Opens .bin/.idx files made elsewhere, of ids of `tokenizer`, as they are: with or without bos and eos.

        Raises DataError: missing, damaged, or of ids that the tokenizer does not have.
        """
        key, num_tokens = hashlib.sha256(), 0
        for prefix in prefixes:
            part = IndexedTokens(prefix)
            if (largest := part.largest_sampled_id()) >= tokenizer.vocab_size:
                raise DataError(
                    f"{prefix}: holds token {largest}, but the tokenizer has {tokenizer.vocab_size}; set "
                    "data.tokenizer to the one that the files were made with"
                )
            num_tokens += part.count_tokens()
            for suffix in (".idx", ".bin"):
                key.update(sampled_hash(Path(f"{prefix}{suffix}")).encode())
        return cls._of_parts(
            prefixes,
            prefix_path=prefixes[0],
            key=key.hexdigest(),
            tokenizer_fingerprint=None,
            num_tokens=num_tokens,
            skips=SkipCounts(),
        )

    @classmethod
    def _of_parts(cls, prefixes: Sequence[Path], **facts: Any) -> TokenFiles:
        part = lru_cache(_MAPPED_AT_A_TIME)(lambda number: IndexedTokens(prefixes[number]))
        # Of several, copies: their files do not stay open.
        lengths = [part(0).lengths] if len(prefixes) == 1 else [lengths_of(prefix) for prefix in prefixes]
        return cls(
            num_documents=sum(map(len, lengths)),
            prefixes=prefixes,
            lengths=lengths[0] if len(prefixes) == 1 else np.concatenate(lengths),
            _part=part,
            _ends=np.cumsum([len(part) for part in lengths]).tolist(),
            **facts,
        )

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A copy of the ids [stop - start] int32 of a document, from offset `start` up to `stop`.

        Raises IndexError unless 0 <= document < num_documents and 0 <= start <= stop <= its length.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} is not one of {self.num_documents}")
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens {start}:{stop} are not within the {length} of document {document}")
        if start == stop:
            return np.empty(0, dtype=np.int32)
        number = bisect_right(self._ends, document)
        first = self._ends[number - 1] if number else 0
        return self._part(number).tokens(document - first, start, stop)


def lengths_of(prefix: Path) -> np.ndarray:
    """A copy of the lengths [num_documents] int32 of a pair of token files."""
    return np.array(IndexedTokens(prefix).lengths)


def shard_paths(prefix_path: Path, manifest: dict[str, Any]) -> list[Path]:
    """Prefixes of the pairs of token files that a manifest is of: others', or its own."""
    if SHARDS not in manifest:
        return [prefix_path]
    shards = prefix_path.parent.parent / SHARDS
    return [shards / key / "tokens" for key in manifest[SHARDS]]


def read_manifest(prefix_path: Path) -> dict[str, Any] | None:
    """The manifest, or None if it, or a file that it is of, is missing or not of its size.

    Raises:
        DataError: a later version of this program wrote it.
    """
    try:
        manifest = json.loads(read_text(f"{prefix_path}.json"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict):
        return None
    if manifest.get("layout", 1) > LAYOUT:
        raise DataError(
            f"{prefix_path}: token files of layout {manifest['layout']}, written by a later version; this one knows "
            f"{LAYOUT}: name another data.cache, or use that version"
        )
    if manifest.pop(_CHECK, None) not in (None, _check_of(manifest)):
        return None
    if SHARDS in manifest:
        shards = shard_paths(prefix_path, manifest)
        return manifest if all(read_manifest(shard) is not None for shard in shards) else None
    try:
        return manifest if manifest.get("sizes") == _sizes(prefix_path) else None
    except OSError:
        return None


def write_manifest(prefix_path: Path, manifest: dict[str, Any]) -> None:
    """The manifest of a pair of token files, or, with `shards`, of several pairs."""
    own = {} if SHARDS in manifest else {"sizes": _sizes(prefix_path), "samples": _samples(prefix_path)}
    whole = {"layout": LAYOUT, **manifest, **own}
    with open_regular(f"{prefix_path}.json", "wb") as file:
        file.write(json.dumps({**whole, _CHECK: _check_of(whole)}, indent=1).encode())


def is_whole(prefix_path: Path) -> bool:
    """Whether token files are there and, by samples of them, what was written; files of old know no samples."""
    manifest = read_manifest(prefix_path)
    if manifest is None:
        return False
    if SHARDS in manifest:
        return all(is_whole(shard) for shard in shard_paths(prefix_path, manifest))
    return manifest.get("samples") in (None, _samples(prefix_path))


def _check_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _samples(prefix_path: Path) -> dict[str, str]:
    return {suffix: sampled_hash(Path(f"{prefix_path}{suffix}")) for suffix in _SUFFIXES}


def _sizes(prefix_path: Path) -> dict[str, int]:
    return {suffix: os.path.getsize(f"{prefix_path}{suffix}") for suffix in _SUFFIXES}
