"""Own the pages of the KV cache: a pool of pages, and batches that always give theirs back.

The sequences of a group (rollouts of one prefix) share the prefix's pages; each has suffix pages of its own.
A block table row lists the pages of one prefix or suffix, padded with -1; position p is stored at slot
row[p // page_size] * page_size + p % page_size, and slot -1 means "write nothing".

Each function exists twice: compiled ("cpp", sip_engine._csrc) and in Python ("python", here), which is the
definition. Arrays are contiguous numpy arrays, int32 for pages and lengths, int64 for slots, bool for flags;
outputs are written in place, so that they may be views of pinned or shared memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sip_engine.utils.errors import ConfigError, SipError

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]
Impl = Literal["cpp", "python"]

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


# --- the definition: checks ---------------------------------------------------------------------------------


def _check_arrays(dtype: type, ndim: int, *, writable: bool = False, **arrays: object) -> None:
    wanted = f"{'writable ' if writable else ''}contiguous {ndim}-d {np.dtype(dtype)} array"
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise PageError(f"{name} must be a {wanted}, got {type(array).__name__}")
        flags = array.flags
        if (
            array.dtype != dtype
            or array.ndim != ndim
            or not flags.c_contiguous
            or (writable and not flags.writeable)
        ):
            got = f"{array.ndim}-d {array.dtype}"
            got += "" if flags.c_contiguous else ", not contiguous"
            got += "" if flags.writeable else ", read-only"
            raise PageError(f"{name} must be a {wanted}, got {got}")


def _check_sizes(expected: int, **arrays: NDArray) -> None:
    for name, array in arrays.items():
        if len(array) != expected:
            raise PageError(f"{name} has {len(array)} entries: it must have {expected}")


def _check_at_least(least: int, **values: int | Int32s) -> None:
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            for i in np.flatnonzero(value < least)[:1]:
                raise PageError(f"{name}[{i}] is {value[i]}: it must be at least {least}")
        elif value < least:
            raise PageError(f"{name} is {value}: it must be at least {least}")


def _no_page(row: int, position: int, tables: Int32s, page_size: int) -> PageError:
    size = f"{tables.shape[1]} pages of {page_size} tokens"
    return PageError(f"row {row} has no page for position {position}: its table holds at most {size}")


# --- the definition: allocator ------------------------------------------------------------------------------


class PyPageAllocator:
    """Reference-counted pages, lowest free number first. Every call does all of its work or none."""

    def __init__(self, num_pages: int) -> None:
        if not 1 <= num_pages <= MAX_PAGES:
            raise PageError(f"num_pages is {num_pages}: a pool has 1 to {MAX_PAGES} pages")
        self._counts = np.zeros(num_pages, np.int64)

    @property
    def num_pages(self) -> int:
        return len(self._counts)

    @property
    def num_used(self) -> int:
        return int(np.count_nonzero(self._counts))

    @property
    def num_free(self) -> int:
        return self.num_pages - self.num_used

    def ref_count(self, page: int) -> int:
        """References held on `page`. Raises PageError outside the pool."""
        if not 0 <= page < self.num_pages:
            pool = f"the pool of {self.num_pages} pages"
            raise PageError(f"page {page} is outside {pool}: pass pages that allocate() returned")
        return int(self._counts[page])

    def allocate(self, count: int) -> Int32s:
        """Take `count` pages, each with one reference: int32 [count], ascending. Raises OutOfPages."""
        if count < 0:
            raise PageError(f"cannot allocate {count} pages: ask for 0 or more")
        if count > self.num_free:
            raise OutOfPages(count, self.num_free)
        pages = np.flatnonzero(self._counts == 0)[:count]
        self._counts[pages] = 1
        return pages.astype(np.int32)

    def retain(self, pages: Int32s) -> None:
        """Add one reference for every entry. Raises PageError if one is free or outside the pool."""
        self._change(pages, +1)

    def release(self, pages: Int32s) -> None:
        """Drop one reference for every entry; at 0 the page is free. Raises PageError for one too many."""
        self._change(pages, -1)

    def _change(self, pages: Int32s, by: int) -> None:
        _check_arrays(np.int32, 1, pages=pages)
        counts = self._counts.copy()
        for page in pages.tolist():
            if self.ref_count(page) == 0 or counts[page] == 0:
                raise PageError(f"page {page} has no reference left: retain and release held pages only")
            counts[page] += by
        self._counts = counts


# --- the definition: planner --------------------------------------------------------------------------------


def _group_pages(prefix_lens: Int32s, num_rollouts: Int32s, suffix_tokens: int, page_size: int) -> Int64s:
    """ceil(P / page) + G * ceil(S / page) of each group, int64 [groups]."""
    _check_arrays(np.int32, 1, prefix_lens=prefix_lens, num_rollouts=num_rollouts)
    _check_at_least(1, page_size=page_size)
    _check_at_least(0, suffix_tokens=suffix_tokens)
    _check_sizes(len(prefix_lens), num_rollouts=num_rollouts)
    _check_at_least(0, prefix_lens=prefix_lens)
    _check_at_least(1, num_rollouts=num_rollouts)
    return -(-prefix_lens.astype(np.int64) // page_size) + num_rollouts.astype(np.int64) * -(
        -suffix_tokens // page_size
    )


def py_num_wave_pages(prefix_lens: Int32s, num_rollouts: Int32s, suffix_tokens: int, page_size: int) -> int:
    """Pages of a wave: sum over groups of ceil(P / page) + sequences * ceil(S / page)."""
    return int(_group_pages(prefix_lens, num_rollouts, suffix_tokens, page_size).sum())


def py_num_groups_that_fit(
    prefix_lens: Int32s,
    num_rollouts: Int32s,
    suffix_tokens: int,
    page_size: int,
    num_free_pages: int,
    max_sequences: int,
) -> int:
    """How many leading groups need at most `num_free_pages` pages and `max_sequences` sequences together."""
    pages = _group_pages(prefix_lens, num_rollouts, suffix_tokens, page_size).cumsum()
    sequences = num_rollouts.cumsum(dtype=np.int64)
    return int(np.count_nonzero((pages <= num_free_pages) & (sequences <= max_sequences)))


def py_fill_prefix_tables(pages: Int32s, prefix_lens: Int32s, page_size: int, tables: Int32s) -> None:
    """Deal `pages` to the rows of `tables` [rows, width] in order, ceil(prefix_lens[r] / page_size) each."""
    _check_arrays(np.int32, 1, pages=pages, prefix_lens=prefix_lens)
    _check_arrays(np.int32, 2, tables=tables, writable=True)
    _check_at_least(1, page_size=page_size)
    _check_sizes(len(tables), prefix_lens=prefix_lens)
    _check_at_least(0, prefix_lens=prefix_lens)
    _deal(pages, [-(-length // page_size) for length in prefix_lens.tolist()], tables)


def py_fill_suffix_tables(pages: Int32s, suffix_tokens: int, page_size: int, tables: Int32s) -> None:
    """The same with one length, `suffix_tokens`, for every row."""
    _check_arrays(np.int32, 1, pages=pages)
    _check_arrays(np.int32, 2, tables=tables, writable=True)
    _check_at_least(1, page_size=page_size)
    _check_at_least(0, suffix_tokens=suffix_tokens)
    _deal(pages, [-(-suffix_tokens // page_size)] * len(tables), tables)


def _deal(pages: Int32s, blocks: list[int], tables: Int32s) -> None:
    for too_wide in [count for count in blocks if count > tables.shape[1]][:1]:
        columns = f"{tables.shape[1]} columns"
        raise PageError(f"a row needs {too_wide} pages but the block table has {columns}: make it wider")
    _check_sizes(sum(blocks), pages=pages)
    tables.fill(-1)
    first = 0
    for row, count in enumerate(blocks):
        tables[row, :count] = pages[first : first + count]
        first += count


def py_fill_slots(tables: Int32s, lens: Int32s, page_size: int, slots: Int64s) -> None:
    """Write to `slots` [rows] the slot of position lens[row] in each row of `tables`: its next token's."""
    _check_arrays(np.int32, 2, tables=tables)
    _check_arrays(np.int32, 1, lens=lens)
    _check_arrays(np.int64, 1, slots=slots, writable=True)
    _check_at_least(1, page_size=page_size)
    _check_sizes(len(tables), lens=lens, slots=slots)
    for row, position in enumerate(lens.tolist()):
        slots[row] = _slot(tables, row, position, page_size)


def py_fill_prefill_slots(
    tables: Int32s, starts: Int32s, lens: Int32s, page_size: int, slots: Int64s
) -> None:
    """Write the slots of positions starts[row] .. starts[row] + lens[row] - 1, row after row, to `slots`."""
    _check_arrays(np.int32, 2, tables=tables)
    _check_arrays(np.int32, 1, starts=starts, lens=lens)
    _check_arrays(np.int64, 1, slots=slots, writable=True)
    _check_at_least(1, page_size=page_size)
    _check_sizes(len(tables), starts=starts, lens=lens)
    _check_at_least(0, starts=starts, lens=lens)
    _check_sizes(int(lens.sum(dtype=np.int64)), slots=slots)
    spans = zip(starts.tolist(), lens.tolist(), strict=True)
    positions = ((row, start + i) for row, (start, count) in enumerate(spans) for i in range(count))
    for i, (row, position) in enumerate(positions):
        slots[i] = _slot(tables, row, position, page_size)


def _slot(tables: Int32s, row: int, position: int, page_size: int) -> int:
    block, offset = divmod(position, page_size)
    if position < 0 or block >= tables.shape[1] or tables[row, block] < 0:
        raise _no_page(row, position, tables, page_size)
    return int(tables[row, block]) * page_size + offset


def py_step(
    allocator: PyPageAllocator,
    prefix_tables: Int32s,
    suffix_tables: Int32s,
    group_of_sequence: Int32s,
    suffix_lens: Int32s,
    finished: Bools,
    num_live: int,
    page_size: int,
    slots: Int64s,
    source_rows: Int32s,
) -> tuple[int, int]:
    """One decode step of live sequences of varying length, in rows 0 .. num_live - 1 of the buffers.

    1. Rows flagged in `finished` give back their suffix pages and one reference on each page of their prefix,
       prefix_tables[group]. The others close ranks in order; source_rows[new row] is the row it came from.
       The flags are cleared; the rows left over have no pages, length 0 and slot -1.
    2. Each row gets in `slots` the slot of its next token, on a new page where one starts, and grows by it.

    Returns (num_live, num_short). If num_short > 0 pages are missing, only part 1 was done: flag sequences to
    preempt and call again. Raises PageError, with nothing changed, if a row is full or a buffer is wrong.
    """
    _check_arrays(np.int32, 2, prefix_tables=prefix_tables)
    _check_arrays(np.int32, 2, suffix_tables=suffix_tables, writable=True)
    _check_arrays(np.int32, 1, group_of_sequence=group_of_sequence, suffix_lens=suffix_lens, writable=True)
    _check_arrays(np.bool_, 1, finished=finished, writable=True)
    _check_arrays(np.int64, 1, slots=slots, writable=True)
    _check_arrays(np.int32, 1, source_rows=source_rows, writable=True)
    _check_at_least(1, page_size=page_size)
    _check_sizes(len(suffix_tables), group_of_sequence=group_of_sequence, suffix_lens=suffix_lens)
    _check_sizes(len(suffix_tables), finished=finished, slots=slots, source_rows=source_rows)
    if not 0 <= num_live <= len(suffix_tables):
        raise PageError(f"num_live is {num_live}: the tables have {len(suffix_tables)} rows")

    gone, kept = (np.flatnonzero(finished[:num_live] == flag) for flag in (True, False))
    returned = [_pages_of_row(prefix_tables, suffix_tables, group_of_sequence, row) for row in gone.tolist()]
    for row in kept.tolist():
        if not 0 <= suffix_lens[row] < suffix_tables.shape[1] * page_size:
            raise _no_page(row, suffix_lens[row], suffix_tables, page_size)
    allocator.release(np.concatenate([np.empty(0, np.int32), *returned]))
    for array, empty in ((suffix_tables, -1), (group_of_sequence, 0), (suffix_lens, 0)):
        array[: len(kept)] = array[kept]
        array[len(kept) : num_live] = empty
    source_rows[: len(kept)] = kept
    slots[len(kept) : num_live] = -1
    finished[:num_live] = False
    return len(kept), _advance(allocator, suffix_tables[: len(kept)], suffix_lens, page_size, slots)


def _pages_of_row(
    prefix_tables: Int32s, suffix_tables: Int32s, group_of_sequence: Int32s, row: int
) -> Int32s:
    group = group_of_sequence[row]
    if not 0 <= group < len(prefix_tables):
        raise PageError(f"group_of_sequence[{row}] is {group}: there are {len(prefix_tables)} prefix rows")
    pages = np.concatenate([suffix_tables[row], prefix_tables[group]])
    return pages[pages >= 0]


def _advance(allocator: PyPageAllocator, tables: Int32s, lens: Int32s, page_size: int, slots: Int64s) -> int:
    """Part 2 of a step. Returns how many pages are missing; if any are, nothing has changed."""
    starting = [row for row, blocks in enumerate(tables) if blocks[lens[row] // page_size] < 0]
    if len(starting) > allocator.num_free:
        return len(starting) - allocator.num_free
    for row, page in zip(starting, allocator.allocate(len(starting)), strict=True):
        tables[row, lens[row] // page_size] = page
    for row in range(len(tables)):
        slots[row] = _slot(tables, row, int(lens[row]), page_size)
        lens[row] += 1
    return 0


# --- choice of implementation -------------------------------------------------------------------------------

_TWIN = SimpleNamespace(
    PageAllocator=PyPageAllocator,
    num_wave_pages=py_num_wave_pages,
    num_groups_that_fit=py_num_groups_that_fit,
    fill_prefix_tables=py_fill_prefix_tables,
    fill_suffix_tables=py_fill_suffix_tables,
    fill_slots=py_fill_slots,
    fill_prefill_slots=py_fill_prefill_slots,
    step=py_step,
)


def planner(impl: Impl) -> ModuleType | SimpleNamespace:
    """PageAllocator and the planner functions, named without `py_`. ConfigError if "cpp" is not built."""
    if impl == "python":
        return _TWIN
    if impl != "cpp":
        raise ConfigError(f'page implementation {impl!r} is unknown: choose "cpp" or "python"')
    try:
        from sip_engine import _csrc
    except ImportError as error:
        raise ConfigError(
            f'page implementation "cpp" cannot be loaded ({error}): install the package or choose "python"'
        ) from error
    return _csrc


# --- owners -------------------------------------------------------------------------------------------------


class PagePool:
    """`num_pages` pages of `page_size` tokens: an allocator and the planner of the same implementation."""

    def __init__(self, num_pages: int, page_size: int, impl: Impl = "cpp") -> None:
        """Raises PageError for a size below 1, ConfigError if `impl` is not there."""
        _check_at_least(1, page_size=page_size)
        self.page_size = page_size
        self.planner = planner(impl)
        self.allocator = self.planner.PageAllocator(num_pages)

    def num_groups_that_fit(
        self, prefix_lens: Int32s, num_rollouts: Int32s, suffix_tokens: int, max_sequences: int
    ) -> int:
        """How many leading groups fit in the free pages and in `max_sequences`, suffixes at full length."""
        free = self.allocator.num_free
        return self.planner.num_groups_that_fit(
            prefix_lens, num_rollouts, suffix_tokens, self.page_size, free, max_sequences
        )


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
        """One decode step, see `py_step`: afterwards `slots` says where the next token of each row goes.

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
