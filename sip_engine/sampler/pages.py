"""Own the pages of the KV cache: a pool of pages, and batches that always give theirs back.

The sequences of a group (rollouts of one prefix) share the prefix's pages; each has suffix pages of its own.
A block table row lists the pages of one prefix or suffix, padded with -1; position p is stored at slot
row[p // page_size] * page_size + p % page_size, and slot -1 means "write nothing".

Counting and table filling are compiled (csrc/, as `sip_engine._csrc`); tests/page_twin.py says in Python what they
compute. Arrays are contiguous numpy arrays, int32 for pages and lengths, int64 for slots, bool for flags; outputs are
written in place, so that they may be views of pinned or shared memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sip_engine.utils.errors import ConfigError, SipError

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

MAX_PAGES = 2**31 - 1


class PageError(SipError, ValueError):
    """A page list, buffer or size breaks a rule; nothing was changed."""


class OutOfPages(SipError):
    """More pages were asked for than are free; none was taken."""

    def __init__(self, asked: int, free: int) -> None:
        super().__init__(asked, free)
        self.asked, self.free = asked, free

    def __str__(self) -> str:
        return f"{self.asked} pages asked but {self.free} free: admit fewer sequences or enlarge the pool"


class PagePool:
    """`num_pages` pages of `page_size` tokens: an allocator and the planner that it belongs to."""

    def __init__(self, num_pages: int, page_size: int, planner: ModuleType | None = None) -> None:
        """`planner`: PageAllocator and the functions of `sip_engine._csrc`, which is the default.

        Raises PageError for a size below 1, ConfigError if the extension is not built.
        """
        _check_at_least(1, page_size=page_size)
        self.page_size = page_size
        self.planner: Any = planner or _compiled()
        self.allocator = self.planner.PageAllocator(num_pages)


def _compiled() -> ModuleType:
    try:
        from sip_engine import _csrc
    except ImportError as error:
        raise ConfigError(
            f"the compiled page planner cannot be loaded ({error}): install the package"
        ) from error
    return _csrc


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise PageError(f"{name} is {value}: it must be at least {least}")


@dataclass(frozen=True)
class WaveTables:
    """Where a wave's tokens are stored; all int32. Sequences are sorted by group."""

    prefix_tables: Int32s
    """[groups, pages of the longest prefix]"""
    suffix_tables: Int32s
    """[sequences, pages of a suffix]"""
    group_of_sequence: Int32s
    """[sequences]"""
    group_starts: Int32s
    """[groups + 1]: group g has sequences group_starts[g] .. group_starts[g + 1] - 1."""


class WavePages(AbstractContextManager):
    """Pages of waves of fixed suffix length: all taken at admission, so that no decode step allocates.

    Use as a context manager: every page goes back to the pool, also after an exception.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._held: list[Int32s] = []

    def admit(self, prefix_lens: Int32s, num_rollouts: Int32s, suffix_tokens: int) -> WaveTables:
        """Take sum ceil(P / page) + sequences * ceil(S / page) pages for groups, int32 [groups] each.

        Raises PageError for bad lengths and OutOfPages when they do not fit; no page is taken then.
        """
        planner, allocator, page_size = self._pool.planner, self._pool.allocator, self._pool.page_size
        num_prefix_pages = planner.num_wave_pages(prefix_lens, num_rollouts, 0, page_size)
        num_pages = planner.num_wave_pages(prefix_lens, num_rollouts, suffix_tokens, page_size)
        pages = allocator.allocate(num_pages)
        self._held.append(pages)
        longest = int(prefix_lens.max(initial=0))
        prefix_tables = np.empty((len(prefix_lens), -(-longest // page_size)), np.int32)
        planner.fill_prefix_tables(pages[:num_prefix_pages], prefix_lens, page_size, prefix_tables)
        group_of_sequence = np.repeat(np.arange(len(prefix_lens), dtype=np.int32), num_rollouts)
        suffix_tables = np.empty((len(group_of_sequence), -(-suffix_tokens // page_size)), np.int32)
        planner.fill_suffix_tables(pages[num_prefix_pages:], suffix_tokens, page_size, suffix_tables)
        group_starts = np.concatenate([[0], num_rollouts.cumsum()]).astype(np.int32)
        return WaveTables(prefix_tables, suffix_tables, group_of_sequence, group_starts)

    def release(self) -> None:
        """Give every page back; the tables are void from here on."""
        while self._held:
            self._pool.allocator.release(self._held.pop())

    def __exit__(self, *exception: object) -> None:
        self.release()


class RollingPages(AbstractContextManager):
    """Pages of sequences of varying length: continuous batching, with preemption when pages run out.

    Live sequences are rows 0 .. num_live - 1 of `suffix_tables` [max_sequences, width], `suffix_lens`,
    `group_of_sequence`, `slots` and `source_rows`, sorted by group; groups are rows 0 .. num_groups - 1 of
    `prefix_tables` and `prefix_lens`. To retire or preempt rows, set `finished[row]` before `step`. Each live
    sequence holds one reference on each page of its prefix. Use as a context manager.
    """

    def __init__(
        self, pool: PagePool, *, max_sequences: int, max_prefix_tokens: int, max_suffix_tokens: int
    ) -> None:
        """Raises PageError for sizes below 1 (sequences) or 0 (tokens)."""
        _check_at_least(1, max_sequences=max_sequences)
        _check_at_least(0, max_prefix_tokens=max_prefix_tokens, max_suffix_tokens=max_suffix_tokens)
        self._pool = pool
        self.max_prefix_tokens = max_prefix_tokens
        self.num_live = self.num_groups = 0
        prefix_blocks, suffix_blocks = (
            -(-n // pool.page_size) for n in (max_prefix_tokens, max_suffix_tokens)
        )
        self.prefix_tables = np.full((max_sequences, prefix_blocks), -1, np.int32)
        self.suffix_tables = np.full((max_sequences, suffix_blocks), -1, np.int32)
        self.prefix_lens, self.suffix_lens, self.group_of_sequence, self.source_rows = np.zeros(
            (4, max_sequences), np.int32
        )
        self.slots = np.full(max_sequences, -1, np.int64)
        self.finished = np.zeros(max_sequences, np.bool_)

    @property
    def group_starts(self) -> Int32s:
        """int32 [num_groups + 1]; a group whose sequences have all gone is empty until the next admission."""
        groups = np.arange(self.num_groups + 1)
        return np.searchsorted(self.group_of_sequence[: self.num_live], groups).astype(np.int32)

    def admit(self, prefix_lens: Int32s, num_rollouts: Int32s) -> slice:
        """Append groups (int32 [groups] each) with empty suffixes, taking the pages of their prefixes.

        Returns the new rows. Groups without sequences are dropped first, so group numbers may change. Raises
        PageError for bad or too many lengths and OutOfPages when they do not fit; no page is taken then.
        """
        planner, allocator, page_size = self._pool.planner, self._pool.allocator, self._pool.page_size
        num_pages = planner.num_wave_pages(prefix_lens, num_rollouts, 0, page_size)
        rows = slice(self.num_live, self.num_live + int(num_rollouts.sum(dtype=np.int64)))
        if rows.stop > len(self.suffix_tables):
            raise PageError(
                f"{rows.stop} sequences would be live: the batch has {len(self.suffix_tables)} rows"
            )
        longest = int(prefix_lens.max(initial=0))
        if longest > self.max_prefix_tokens:
            raise PageError(
                f"a prefix has {longest} tokens: the batch takes at most {self.max_prefix_tokens}"
            )
        self._drop_empty_groups()
        pages = allocator.allocate(num_pages)
        groups = slice(self.num_groups, self.num_groups + len(prefix_lens))
        planner.fill_prefix_tables(pages, prefix_lens, page_size, self.prefix_tables[groups])
        allocator.retain(np.repeat(pages, np.repeat(num_rollouts - 1, -(-prefix_lens // page_size))))
        self.prefix_lens[groups] = prefix_lens
        self.group_of_sequence[rows] = np.repeat(np.arange(groups.start, groups.stop), num_rollouts)
        self.num_live, self.num_groups = rows.stop, groups.stop
        return rows

    def _drop_empty_groups(self) -> None:
        alive, renumbered = np.unique(self.group_of_sequence[: self.num_live], return_inverse=True)
        self.prefix_tables[: len(alive)] = self.prefix_tables[alive]
        self.prefix_lens[: len(alive)] = self.prefix_lens[alive]
        self.group_of_sequence[: self.num_live] = renumbered
        self.num_groups = len(alive)

    def step(self) -> int:
        """One decode step (`step` of csrc/wave_planner.h); `slots` then says where each row's next token goes.

        Returns the number of pages missing. If not 0, finished rows have gone but no sequence has grown:
        flag rows to preempt and call again (their tokens are computed anew when they are admitted again).
        """
        self.num_live, num_short = self._pool.planner.step(
            self._pool.allocator,
            self.prefix_tables,
            self.suffix_tables,
            self.group_of_sequence,
            self.suffix_lens,
            self.finished,
            self.num_live,
            self._pool.page_size,
            self.slots,
            self.source_rows,
        )
        return num_short

    def release(self) -> None:
        """Retire every sequence and give all pages back."""
        self.finished[: self.num_live] = True
        self.step()
        self.num_groups = 0

    def __exit__(self, *exception: object) -> None:
        self.release()
