"""Tokenizes raw text once into Megatron's .bin/.idx files and reads them back at random."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from sip_engine.data.documents import MAX_DOCUMENT_BYTES, SkipCounts, list_input_files, read_documents
from sip_engine.data.indexed import IndexedTokens, IndexedWriter, sampled_hash
from sip_engine.data.inventory import take_inventory
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import atomic_folder
from sip_engine.utils.regular import open_regular, read_text

FORMAT_VERSION = 1
"""Part of the cache key: raise it when the same input would give other files."""

_BATCH_CHARS = 2**20
_HASH_BYTES = 2**20

_OnBytes = Callable[[int], object]


@dataclass(frozen=True)
class TokenFiles:
    """Tokenized documents on disk, memory-mapped. Every document is `[bos] + ids + [eos]`."""

    prefix_path: Path
    """The files are this path with .bin, .idx and .json (the manifest) appended."""
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
    _parts: Sequence[IndexedTokens] = field(repr=False, compare=False)
    _ends: Sequence[int] = field(repr=False, compare=False)
    """Documents up to the end of each part."""

    @classmethod
    def open(cls, prefix_path: str | Path) -> TokenFiles:
        """Opens files that `build_token_files` wrote. Raises DataError if they are missing or damaged."""
        prefix_path = Path(prefix_path)
        manifest = _read_manifest(prefix_path)
        if manifest is None:
            raise DataError(
                f"{prefix_path}: token files are missing or damaged; build them again from the text"
            )
        tokens = IndexedTokens(prefix_path)
        return cls(
            prefix_path=prefix_path,
            key=manifest["key"],
            tokenizer_fingerprint=manifest["tokenizer"],
            num_documents=manifest["num_documents"],
            num_tokens=manifest["num_tokens"],
            skips=SkipCounts(manifest["skips"]),
            lengths=tokens.lengths,
            _parts=[tokens],
            _ends=[len(tokens.lengths)],
        )

    @classmethod
    def open_foreign(cls, prefixes: Sequence[Path], tokenizer: Tokenizer) -> TokenFiles:
        """Opens .bin/.idx files made elsewhere, of ids of `tokenizer`, as they are: with or without bos and eos.

        Raises DataError: missing, damaged, or of ids that the tokenizer does not have.
        """
        parts = [IndexedTokens(prefix) for prefix in prefixes]
        key = hashlib.sha256()
        for part in parts:
            if (largest := part.largest_sampled_id()) >= tokenizer.vocab_size:
                raise DataError(
                    f"{part.prefix}: holds token {largest}, but the tokenizer has {tokenizer.vocab_size}; set "
                    "data.tokenizer to the one that the files were made with"
                )
            for suffix in (".idx", ".bin"):
                key.update(sampled_hash(Path(f"{part.prefix}{suffix}")).encode())
        lengths = [part.lengths for part in parts]
        return cls(
            prefix_path=parts[0].prefix,
            key=key.hexdigest(),
            tokenizer_fingerprint=None,
            num_documents=sum(map(len, lengths)),
            num_tokens=sum(part.count_tokens() for part in parts),
            skips=SkipCounts(),
            lengths=lengths[0] if len(parts) == 1 else np.concatenate(lengths),
            _parts=parts,
            _ends=np.cumsum([len(part) for part in lengths]).tolist(),
        )

    @property
    def num_parts(self) -> int:
        """Pairs of .bin and .idx files."""
        return len(self._parts)

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
        part = bisect_right(self._ends, document)
        return self._parts[part].tokens(document - (self._ends[part - 1] if part else 0), start, stop)


def build_token_files(
    path: str | Path,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    text_column: str = "text",
    *,
    max_bytes: int = MAX_DOCUMENT_BYTES,
    progress: bool = True,
) -> TokenFiles:
    """Tokenizes the text under `path` into `cache_dir`, or opens the files of an earlier call.

    The cache is keyed by content: the tokenizer, the reading rules and a SHA-256 of every input file
    (all input is read for it on every call, so call this on one rank and `TokenFiles.open` on the
    others). A damaged entry is built again. Entries appear by a rename, so several processes may
    build the same one, and a crash leaves no entry.

    text_column, max_bytes: as in `read_documents`.
    progress: show a bar, if the output is a terminal.
    Raises DataError for bad input (see `read_documents`) and for a cache that cannot be written.
    """
    path, cache_dir = Path(path), Path(cache_dir)
    with _progress_bars(progress, list_input_files(path)) as start_bar:
        key = _cache_key(path, tokenizer, text_column, max_bytes, start_bar("Checking"))
        entry = cache_dir / key
        if _read_manifest(entry / "tokens") is None:
            skips, on_bytes = SkipCounts(), start_bar("Tokenizing")
            documents = read_documents(path, text_column, max_bytes=max_bytes, skips=skips, on_bytes=on_bytes)
            with _new_entry(entry) as folder:
                counts = _write_tokens(folder / "tokens", documents, tokenizer)
                manifest = {"key": key, "tokenizer": tokenizer.fingerprint, **counts, "skips": skips}
                _write_manifest(folder / "tokens", manifest)
    return TokenFiles.open(entry / "tokens")


def _cache_key(path: Path, tokenizer: Tokenizer, text_column: str, max_bytes: int, on_bytes: _OnBytes) -> str:
    inventory = take_inventory(path)
    rules = [FORMAT_VERSION, tokenizer.fingerprint, text_column, max_bytes]
    key = hashlib.sha256(json.dumps(rules).encode())
    for name, file in zip(inventory.names, inventory.files, strict=True):
        identity = [name, _sha256(file, on_bytes)]
        key.update(json.dumps(identity).encode())
    return key.hexdigest()


def _sha256(file: Path, on_bytes: _OnBytes) -> str:
    digest = hashlib.sha256()
    try:
        with open_regular(file) as stream:
            while block := stream.read(_HASH_BYTES):
                digest.update(block)
                on_bytes(len(block))
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); make it readable or remove it"
        ) from error
    return digest.hexdigest()


@contextmanager
def _new_entry(entry: Path) -> Iterator[Path]:
    """A temporary folder that becomes `entry` if all goes well, unless another process was first."""
    try:
        with atomic_folder(entry, keep=lambda found: _read_manifest(found / "tokens") is not None) as folder:
            yield folder
    except OSError as error:
        raise DataError(
            f"{entry.parent}: cannot write token files ({error.strerror}); free space or name another cache"
        ) from error


def _write_tokens(prefix_path: Path, documents: Iterable[str], tokenizer: Tokenizer) -> dict[str, int]:
    bos, eos = np.array([[tokenizer.bos_id], [tokenizer.eos_id]], dtype=np.int32)
    writer = IndexedWriter(prefix_path, tokenizer.vocab_size)
    with closing(writer):
        for ids in chain.from_iterable(map(tokenizer.encode_batch, _batches(documents))):
            writer.add(np.concatenate((bos, ids, eos)))
    return {"num_documents": writer.num_documents, "num_tokens": writer.num_tokens}


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents, large enough to keep the tokenizer's threads busy."""
    batch: list[str] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _write_manifest(prefix_path: Path, manifest: dict[str, object]) -> None:
    sizes = {suffix: os.path.getsize(f"{prefix_path}{suffix}") for suffix in (".bin", ".idx")}
    Path(f"{prefix_path}.json").write_text(json.dumps({**manifest, "sizes": sizes}, indent=1))


def _read_manifest(prefix_path: Path) -> dict | None:
    """The manifest, or None if it or a file it names is missing or not of its size."""
    try:
        manifest = json.loads(read_text(f"{prefix_path}.json"))
        sizes = {suffix: os.path.getsize(f"{prefix_path}{suffix}") for suffix in (".bin", ".idx")}
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("sizes") == sizes else None


@contextmanager
def _progress_bars(is_wanted: bool, files: Iterable[Path]) -> Iterator[Callable[[str], _OnBytes]]:
    """Gives a function that starts a bar over the bytes of all files. The bars vanish at the end."""
    console = Console(stderr=True)
    total = sum(file.stat().st_size for file in files)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    is_shown = is_wanted and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as bars:
        yield lambda name: partial(bars.advance, bars.add_task(name, total=total))
