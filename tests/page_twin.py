"""What `sip_engine._csrc` computes, in Python: the definition that the compiled planner is tested against.

Arrays are contiguous numpy arrays, int32 for pages and lengths, int64 for slots, bool for flags; outputs are
written in place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sip_engine.sampler.pages import MAX_PAGES, Bools, Int32s, Int64s, OutOfPages, PageError

# --- checks ---------------------------------------------------------------------------------


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


# --- allocator ------------------------------------------------------------------------------


class PageAllocator:
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


# --- planner --------------------------------------------------------------------------------


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


def num_wave_pages(prefix_lens: Int32s, num_rollouts: Int32s, suffix_tokens: int, page_size: int) -> int:
    """Pages of a wave: sum over groups of ceil(P / page) + sequences * ceil(S / page)."""
    return int(_group_pages(prefix_lens, num_rollouts, suffix_tokens, page_size).sum())


def fill_prefix_tables(pages: Int32s, prefix_lens: Int32s, page_size: int, tables: Int32s) -> None:
    """Deal `pages` to the rows of `tables` [rows, width] in order, ceil(prefix_lens[r] / page_size) each."""
    _check_arrays(np.int32, 1, pages=pages, prefix_lens=prefix_lens)
    _check_arrays(np.int32, 2, tables=tables, writable=True)
    _check_at_least(1, page_size=page_size)
    _check_sizes(len(tables), prefix_lens=prefix_lens)
    _check_at_least(0, prefix_lens=prefix_lens)
    _deal(pages, [-(-length // page_size) for length in prefix_lens.tolist()], tables)


def fill_suffix_tables(pages: Int32s, suffix_tokens: int, page_size: int, tables: Int32s) -> None:
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


def fill_slots(tables: Int32s, lens: Int32s, page_size: int, slots: Int64s) -> None:
    """Write to `slots` [rows] the slot of position lens[row] in each row of `tables`: its next token's."""
    _check_arrays(np.int32, 2, tables=tables)
    _check_arrays(np.int32, 1, lens=lens)
    _check_arrays(np.int64, 1, slots=slots, writable=True)
    _check_at_least(1, page_size=page_size)
    _check_sizes(len(tables), lens=lens, slots=slots)
    for row, position in enumerate(lens.tolist()):
        slots[row] = _slot(tables, row, position, page_size)


def fill_prefill_slots(tables: Int32s, starts: Int32s, lens: Int32s, page_size: int, slots: Int64s) -> None:
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


def step(
    allocator: PageAllocator,
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


def _advance(allocator: PageAllocator, tables: Int32s, lens: Int32s, page_size: int, slots: Int64s) -> int:
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
