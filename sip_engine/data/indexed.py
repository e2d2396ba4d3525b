"""Megatron's .bin/.idx files of token ids: read by memory map, whoever made them, and written in flat memory."""

from __future__ import annotations

import array
import hashlib
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sip_engine.utils.errors import DataError
from sip_engine.utils.regular import check_regular, open_regular

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the ids' type, sequences, document bounds."""
_DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_CHUNK = 2**20
_SAMPLED_IDS = 2**16
SAMPLE_BYTES, SAMPLES = 2**16, 16
"""Files are told apart by their size and this many samples of this size; smaller files are read whole."""


class IndexedTokens:
    """Token ids of documents on disk. Memory-mapped: opening it reads the index once, and no ids."""

    def __init__(self, prefix: Path) -> None:
        """prefix: the path without .bin and .idx. Raises DataError: missing, damaged, or not of this format."""
        self.prefix = prefix
        index, ids = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            size, size_ids = index.stat().st_size, ids.stat().st_size
            with open_regular(index) as file:
                magic, version, code, num_sequences, num_bounds = _HEADER.unpack(file.read(_HEADER.size))
            known = magic == _MAGIC and version == 1 and code in _DTYPES and num_bounds > 0
            end = (
                _HEADER.size + num_sequences * 12 + num_bounds * 8
            )  # a byte of modes may follow each sequence
            if not known or size not in (end, end + num_sequences):
                raise ValueError("not an index of version 1, or cut off")
            check_regular(ids)
            raw = np.memmap(index, mode="r", dtype=np.uint8)
            dtype = np.dtype(_DTYPES[code])
        except (OSError, ValueError, struct.error) as error:
            raise DataError(f"{prefix}: token files cannot be read ({error}); make them anew") from None
        at = _HEADER.size
        lengths = raw[at : (at := at + 4 * num_sequences)].view(np.int32)
        pointers = raw[at : (at := at + 8 * num_sequences)].view(np.int64)
        bounds = raw[at : at + 8 * num_bounds].view(np.int64)
        _check_index(ids, lengths, pointers, bounds, dtype.itemsize, size_ids)
        if num_bounds != num_sequences + 1:  # a document of several sequences is read as one
            first = bounds[:-1][np.diff(bounds) > 0]
            lengths = np.add.reduceat(lengths, first) if len(first) else lengths[:0]
            pointers = pointers[first]
        self.lengths: np.ndarray = lengths
        """[num_documents] int32, mapped where every document is one sequence."""
        self.num_bytes = size_ids
        self._pointers = pointers
        self._ids = np.memmap(ids, mode="r", dtype=np.uint8) if size_ids else np.zeros(0, np.uint8)
        self._dtype = dtype

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """A copy of ids [stop - start] int32."""
        at = int(self._pointers[document]) + start * self._dtype.itemsize
        part = self._ids[at : at + (stop - start) * self._dtype.itemsize]
        return part.view(self._dtype).astype(np.int32)

    def count_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(int(part.sum(dtype=np.int64)) for part in chunks_of(self.lengths))

    def largest_sampled_id(self) -> int:
        """The largest of some thousands of ids from all over the file."""
        ids = self._ids[: len(self._ids) // self._dtype.itemsize * self._dtype.itemsize].view(self._dtype)
        step = max(1, len(ids) // _SAMPLED_IDS)
        return int(ids[::step].max(initial=0))


def _check_index(
    ids: Path, lengths: np.ndarray, pointers: np.ndarray, bounds: np.ndarray, itemsize: int, size_ids: int
) -> None:
    """Raise DataError unless all sequences lie within the file of ids, and all bounds among the sequences."""
    for size, start in zip(chunks_of(lengths), chunks_of(pointers), strict=True):
        if size.min(initial=0) < 0 or start.min(initial=0) < 0:
            raise DataError(
                f"{ids}: its index is damaged: no sequence begins or ends there; make the files anew"
            )
        if len(size) and int((start + size.astype(np.int64) * itemsize).max()) > size_ids:
            raise DataError(f"{ids}: cut off: its index knows of more tokens; make the files anew")
    for part in chunks_of(bounds):
        if part.min(initial=0) < 0 or int(part.max(initial=0)) > len(lengths) or (np.diff(part) < 0).any():
            raise DataError(f"{ids}: its index is damaged: no documents end there; make the files anew")


class IndexedWriter:
    """Writes documents one after another; memory: four bytes a document."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """Ids are two bytes where the vocabulary allows, else four, as Megatron chooses."""
        self._prefix = prefix
        self._dtype = _dtype_for(vocab_size)
        self._file = open_regular(f"{prefix}.bin", "wb")  # closed by close()
        self._lengths = array.array("i")
        self.num_tokens = 0

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add(self, ids: np.ndarray) -> None:
        """One document: ids [num_tokens]."""
        self.add_all(ids, np.array([len(ids)]))

    def add_all(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Documents one after another: ids [num_tokens], and their lengths [num_documents]."""
        self._file.write(ids.astype(self._dtype).tobytes())
        self._lengths.extend(lengths.tolist())
        self.num_tokens += len(ids)

    def close(self) -> None:
        """Writes the index."""
        self._file.close()
        write_index(self._prefix, self._dtype, [np.frombuffer(self._lengths, np.int32)])


def _dtype_for(vocab_size: int) -> type[np.integer]:
    return np.uint16 if vocab_size < 65500 else np.int32


def write_index(prefix: Path, dtype: type[np.integer], parts: Sequence[np.ndarray]) -> None:
    """The .idx of a .bin file whose documents have these lengths, in parts of [num_documents] int32."""
    num, size = sum(map(len, parts)), np.dtype(dtype).itemsize
    with open_regular(f"{prefix}.idx", "wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], num, num + 1))
        for part in parts:
            for lengths in chunks_of(part):
                file.write(lengths.astype("<i4").tobytes())
        at = 0
        for part in parts:
            for lengths in chunks_of(part):
                ends = at + np.cumsum(lengths, dtype=np.int64) * size
                file.write(np.concatenate(([at], ends[:-1])).astype("<i8").tobytes())
                at = int(ends[-1])
        for begin in range(0, num + 1, _CHUNK):
            file.write(np.arange(begin, min(begin + _CHUNK, num + 1), dtype="<i8").tobytes())


def join(prefix: Path, parts: Sequence[Path], vocab_size: int) -> None:
    """One pair of files of several, in their order."""
    with open_regular(f"{prefix}.bin", "wb") as out:
        for part in parts:
            with open_regular(f"{part}.bin") as file:
                shutil.copyfileobj(file, out, 2**24)
    write_index(prefix, _dtype_for(vocab_size), [IndexedTokens(part).lengths for part in parts])


def chunks_of(values: np.ndarray) -> Iterator[np.ndarray]:
    """A long array in pieces that fit in memory."""
    return (values[begin : begin + _CHUNK] for begin in range(0, len(values), _CHUNK))


def sampled_hash(path: Path) -> str:
    """Hex digest of a file's size and of samples all over it; of all its content where that is little."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(struct.pack("<Q", size))
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for number in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def find_token_files(path: Path) -> list[Path]:
    """Prefixes of the .bin/.idx pairs that `path` names: one of them, a prefix, a folder of them; or none."""
    if path.suffix in (".bin", ".idx"):
        return [path.with_suffix("")]
    if path.is_dir():
        pairs = (file.with_suffix("") for file in sorted(path.glob("*.idx")))
        return [prefix for prefix in pairs if Path(f"{prefix}.bin").is_file()]
    return [path] if Path(f"{path}.idx").is_file() else []
