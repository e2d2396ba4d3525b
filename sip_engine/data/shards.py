"""Tokenizes files into token files of their own, in this process or in one a core; memory does not grow with them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np

from sip_engine.data.documents import SkipCounts, read_files
from sip_engine.data.indexed import IndexedWriter
from sip_engine.data.token_files import is_whole, write_manifest
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import atomic_folder
from sip_engine.utils.progress import Transfer

_BATCH_CHARS = 2**20
_WORTH_PROCESSES = 2**25
"""Bytes from which on processes are started, which takes them about two seconds."""
_POLL_SECONDS = 0.5
_STOP = -(2**62)
"""In place of the bytes read: who still works on a file gives it up."""
_AHEAD = 2
"""Batches a process has waiting."""
_PROCESSES_A_READER = 16
"""That one process which only reads keeps busy: it reads JSON lines some twenty times as fast as one tokenizes."""

Encoded = tuple[np.ndarray, np.ndarray]
"""Ids of documents one after another [num_tokens] int32, with bos and eos, and their lengths [num_documents]."""
_Encode = Callable[[Iterable[list[str]]], Iterator[Encoded]]


@dataclass(frozen=True)
class Shard:
    """A file and the folder that its token files go to."""

    file: Path
    entry: Path
    text_column: str
    max_bytes: int

    @property
    def is_done(self) -> bool:
        return is_whole(self.entry / "tokens")


def tokenize_shards(shards: Sequence[Shard], tokenizer: Tokenizer, jobs: int | None, bar: Transfer) -> None:
    """Tokenizes all shards; those that are done stay if another one fails.

    A shard so large that processes would wait for it in the end is read here and encoded by all of them; of the rest
    each has a process to itself, the largest first.

    jobs: processes; None: one a core.
    Raises DataError: a file is damaged or gone, or a process was killed, as for want of memory.
    """
    sizes = {shard: _size(shard.file) for shard in shards}
    jobs = jobs or len(os.sched_getaffinity(0))
    total = sum(sizes.values())
    if jobs == 1 or total < _WORTH_PROCESSES:
        for shard in shards:
            _tokenize(shard, tokenizer, lambda batches: _encode_here(tokenizer, batches, jobs), bar.advance)
        return
    largest = total / jobs / (4 if jobs <= _PROCESSES_A_READER else 1)
    wide = [shard for shard in shards if sizes[shard] > largest]
    narrow = sorted((s for s in shards if s not in wide), key=lambda shard: -sizes[shard])
    context = multiprocessing.get_context("spawn")  # threads of libraries do not outlive a fork
    count = context.Value("q", 0)
    with ProcessPoolExecutor(jobs, context, _start_worker, (tokenizer.model, count)) as pool:
        try:
            for shard in wide:
                _tokenize(
                    shard, tokenizer, lambda batches: _encode_there(pool, batches, jobs * _AHEAD), bar.advance
                )
            _wait_for([pool.submit(_tokenize_in_worker, shard) for shard in narrow], count, bar)
        except BrokenProcessPool:
            raise DataError(
                f"a process that tokenizes was killed, as where memory is short: give fewer --jobs than {jobs}"
            ) from None
        finally:
            with count.get_lock():
                count.value = _STOP
            pool.shutdown(cancel_futures=True)


def _wait_for(futures: Sequence[Future[None]], count: Synchronized[int], bar: Transfer) -> None:
    waiting, seen = set(futures), 0
    while waiting:
        done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
        now = count.value
        bar.advance(now - seen)
        seen = now
        for future in done:
            future.result()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # to be said where it is read


def _tokenize(shard: Shard, tokenizer: Tokenizer, encode: _Encode, on_bytes: Callable[[int], object]) -> None:
    skips, faults = SkipCounts(), list[str]()
    documents = read_files(
        [shard.file],
        shard.text_column,
        skips=skips,
        faults=faults,
        max_bytes=shard.max_bytes,
        on_bytes=on_bytes,
    )
    with atomic_folder(shard.entry, keep=lambda found: is_whole(found / "tokens")) as folder:
        writer = IndexedWriter(folder / "tokens", tokenizer.vocab_size)
        with closing(writer):
            for ids, lengths in encode(_batches(documents)):
                writer.add_all(ids, lengths)
        write_manifest(
            folder / "tokens",
            {
                "tokenizer": tokenizer.fingerprint,
                "num_documents": writer.num_documents,
                "num_tokens": writer.num_tokens,
                "skips": skips,
                "faults": faults,
            },
        )


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents, large enough that passing them on costs little."""
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


def _encode_here(tokenizer: Tokenizer, batches: Iterable[list[str]], num_threads: int) -> Iterator[Encoded]:
    return (_with_marks(tokenizer, texts, num_threads) for texts in batches)


def _encode_there(
    pool: ProcessPoolExecutor, batches: Iterable[list[str]], num_ahead: int
) -> Iterator[Encoded]:
    """In order, with at most `num_ahead` batches on their way."""
    futures: deque[Future[Encoded]] = deque()
    for texts in batches:
        if len(futures) == num_ahead:
            yield futures.popleft().result()
        futures.append(pool.submit(_encode_in_worker, texts))
    while futures:
        yield futures.popleft().result()


def _with_marks(tokenizer: Tokenizer, texts: list[str], num_threads: int) -> Encoded:
    bos, eos = np.array([[tokenizer.bos_id], [tokenizer.eos_id]], dtype=np.int32)
    documents = tokenizer.encode_batch(texts, num_threads)
    lengths = np.array([len(ids) + 2 for ids in documents], np.int32)
    return np.concatenate([part for ids in documents for part in (bos, ids, eos)]), lengths


# In a worker process ----------------------------------------------------------------------------------------------

_tokenizer: Tokenizer
_count: Synchronized[int]


def _start_worker(model: bytes, count: Synchronized[int]) -> None:
    global _tokenizer, _count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer, _count = Tokenizer(model), count


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenize_in_worker(shard: Shard) -> None:
    _tokenize(shard, _tokenizer, lambda batches: _encode_here(_tokenizer, batches, 1), _advance)


def _encode_in_worker(texts: list[str]) -> Encoded:
    return _with_marks(_tokenizer, texts, 1)


def _advance(num_bytes: int) -> None:
    with _count.get_lock():
        if _count.value < 0:
            raise RuntimeError("the work was broken off")
        _count.value += num_bytes
