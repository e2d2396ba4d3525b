"""Paged KV memory: the compiled allocator and planner against their Python twin, literals and accounting."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import numpy as np
import page_twin as TWIN
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from sip_engine import _csrc as CPP
from sip_engine.sampler.pages import OutOfPages, PageError, PagePool, RollingPages, WavePages
from sip_engine.utils.errors import ConfigError, SipError

both = pytest.mark.parametrize("impl", [CPP, TWIN], ids=["cpp", "python"])


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def outcome(function, *args) -> Any:
    """What a call gives: its result as plain Python, or the type and text of its error."""
    try:
        result = function(*args)
    except SipError as error:
        return type(error), str(error)
    return result.tolist() if isinstance(result, np.ndarray) else result


def refused(result) -> bool:
    return isinstance(result, tuple) and isinstance(result[0], type)


def usually(good, bad):
    """A rare draw of `bad`, so that most cases get past the checks."""
    return st.integers(0, 9).flatmap(lambda roll: bad if roll == 9 else good)


# --- allocator ----------------------------------------------------------------------------------------------


strays = usually(st.none(), st.integers(-2, 202))


class Allocators(RuleBasedStateMachine):
    """Both allocators side by side, judged by a plain count of the references held."""

    num_operations = 0
    num_refused = 0

    @initialize(num_pages=st.integers(1, 200))
    def make(self, num_pages):
        self.num_pages = num_pages
        self.cpp, self.twin = CPP.PageAllocator(num_pages), TWIN.PageAllocator(num_pages)
        self.held: Counter[int] = Counter()

    def call(self, name, argument):
        result = outcome(getattr(self.cpp, name), argument)
        assert result == outcome(getattr(self.twin, name), argument)
        Allocators.num_operations += 1
        Allocators.num_refused += refused(result)
        return result

    def pages(self, picks, stray):
        """Held pages, and now and then any number."""
        held = sorted(self.held)
        chosen = [held[pick % len(held)] for pick in picks if held]
        return i32(*chosen, *([] if stray is None else [stray]))

    @rule(count=st.integers(-1, 70))
    def allocate(self, count):
        free = sorted(set(range(self.num_pages)) - self.held.keys())
        result = self.call("allocate", count)
        if 0 <= count <= len(free):
            assert result == free[:count]
            self.held.update(result)
        else:
            assert result[0] is (PageError if count < 0 else OutOfPages)

    @rule(picks=st.lists(st.integers(0, 199), max_size=12), stray=strays)
    def retain(self, picks, stray):
        pages = self.pages(picks, stray)
        result = self.call("retain", pages)
        if self.held.keys() >= set(pages.tolist()):
            assert result is None
            self.held.update(pages.tolist())
        else:
            assert result[0] is PageError

    @rule(picks=st.lists(st.integers(0, 199), max_size=12), stray=strays)
    def release(self, picks, stray):
        pages = self.pages(picks, stray)
        result = self.call("release", pages)
        if self.held >= Counter(pages.tolist()):
            assert result is None
            self.held -= Counter(pages.tolist())
        else:
            assert result[0] is PageError

    @rule(page=st.integers(-2, 202))
    def ref_count(self, page):
        result = self.call("ref_count", page)
        assert result == self.held[page] if 0 <= page < self.num_pages else result[0] is PageError

    @invariant()
    def same_counts(self):
        for allocator in (self.cpp, self.twin) if hasattr(self, "held") else ():
            assert (allocator.num_used, allocator.num_free) == (
                len(self.held),
                self.num_pages - len(self.held),
            )

    def teardown(self):
        if hasattr(self, "held"):
            assert self.call("release", i32(*self.held.elements())) is None
            assert self.cpp.num_free == self.twin.num_free == self.cpp.num_pages == self.num_pages


@pytest.mark.slow
def test_allocators_agree_over_ten_thousand_operations():
    Allocators.num_operations = Allocators.num_refused = 0
    run_state_machine_as_test(
        Allocators, settings=settings(max_examples=250, stateful_step_count=60, deadline=None)
    )
    assert Allocators.num_operations >= 10_000
    assert Allocators.num_refused >= 1_000


@both
def test_allocator_literal(impl):
    pages = impl.PageAllocator(70)
    assert pages.allocate(3).tolist() == [0, 1, 2]
    assert pages.allocate(64).tolist() == list(range(3, 67))
    pages.release(i32(66, 1))
    pages.retain(i32(5, 5))
    assert pages.allocate(3).tolist() == [1, 66, 67]
    assert (pages.ref_count(5), pages.ref_count(66), pages.ref_count(69)) == (3, 1, 0)
    with pytest.raises(OutOfPages, match="3 pages asked but 2 free") as caught:
        pages.allocate(3)
    assert (caught.value.asked, caught.value.free) == (3, 2)
    with pytest.raises(PageError, match="page 5 has no reference left"):
        pages.release(i32(5, 4, 5, 5, 5))
    assert (pages.ref_count(4), pages.ref_count(5), pages.num_used) == (1, 3, 68)


@both
@pytest.mark.parametrize("num_pages", [0, -1, 2**31])
def test_pool_size_is_checked(impl, num_pages):
    with pytest.raises(PageError, match=f"num_pages is {num_pages}: a pool has 1 to 2147483647 pages"):
        impl.PageAllocator(num_pages)


# --- planner ------------------------------------------------------------------------------------------------


def agree(name, *args):
    """Both kinds on copies of `args`: same result or error, and same outputs unless refused."""
    mine, truth = ([arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args] for _ in range(2))
    result = outcome(getattr(CPP, name), *mine)
    assert result == outcome(getattr(TWIN, name), *truth)
    for left, right in zip(mine, truth, strict=True):
        if isinstance(left, np.ndarray) and not refused(result):
            assert left.tolist() == right.tolist()
    return result


few = st.integers(0, 8)


def int32s(low, high, size=few):
    return size.flatmap(lambda n: st.lists(st.integers(low, high), min_size=n, max_size=n)).map(
        lambda x: i32(*x)
    )


page_sizes = usually(st.integers(1, 33), st.integers(-1, 0))


@settings(max_examples=200, deadline=None)
@given(st.data(), page_sizes, usually(st.integers(0, 300), st.just(-1)))
def test_page_counts_agree(data, page_size, suffix_tokens):
    groups = st.just(data.draw(st.integers(0, 8)))
    prefix_lens = data.draw(int32s(0, 2000, groups) | int32s(-1, 5, groups))
    num_rollouts = data.draw(int32s(1, 20, usually(groups, few)) | int32s(0, 3, groups))
    args = (prefix_lens, num_rollouts, suffix_tokens, page_size)
    total = agree("num_wave_pages", *args)
    assert refused(total) or total >= num_rollouts.sum() * -(-suffix_tokens // page_size)


@both
def test_page_counts_literal(impl):
    plan, lens, rollouts = impl, i32(17, 16, 0, 1), i32(2, 3, 1, 4)
    assert plan.num_wave_pages(lens, rollouts, 33, 16) == (2 + 1 + 0 + 1) + 10 * 3
    huge = np.full(4, 2**31 - 1, np.int32)
    assert plan.num_wave_pages(huge, huge, 1000, 1) == 4 * (2**31 - 1) * 1001


@settings(max_examples=200, deadline=None)
@given(st.data(), page_sizes)
def test_tables_and_slots_agree(data, page_size):
    lens = data.draw(int32s(0, 100) | int32s(-1, 100))
    blocks = [-(-int(n) // max(page_size, 1)) for n in lens]
    width = max(0, max(blocks, default=0) + data.draw(usually(st.integers(0, 2), st.just(-1))))
    num_pages = max(0, sum(blocks) + data.draw(usually(st.just(0), st.integers(-1, 1))))
    pages = np.array(data.draw(st.permutations(range(num_pages))), np.int32)
    rows = max(0, len(lens) + data.draw(usually(st.just(0), st.integers(-1, 1))))
    tables = np.full((rows, width), 77, np.int32)
    agree("fill_prefix_tables", pages, lens, page_size, tables)
    agree("fill_suffix_tables", pages, int(lens[0]) if len(lens) else 5, page_size, tables)
    suffix_tokens = data.draw(st.integers(0, 3 * max(page_size, 1)))
    dealt = np.arange(rows * -(-suffix_tokens // max(page_size, 1)), dtype=np.int32)
    agree("fill_suffix_tables", dealt, suffix_tokens, page_size, tables)
    if refused(outcome(TWIN.fill_prefix_tables, pages, lens, page_size, tables)):
        return
    ends = i32(*(data.draw(st.integers(0, n) | st.integers(0, max(n - 1, 0))) for n in lens.tolist()))
    agree("fill_slots", tables, ends, page_size, np.full(rows, 7, np.int64))
    starts = i32(*(data.draw(st.integers(0, n)) for n in ends.tolist()))
    num_slots = int((ends - starts).sum()) + data.draw(usually(st.just(0), st.just(1)))
    agree("fill_prefill_slots", tables, starts, ends - starts, page_size, np.full(num_slots, 7, np.int64))


@both
def test_tables_and_slots_literal(impl):
    plan = impl
    tables = np.full((3, 3), 7, np.int32)
    plan.fill_prefix_tables(i32(9, 4, 5, 0), i32(5, 0, 8), 4, tables)
    assert tables.tolist() == [[9, 4, -1], [-1, -1, -1], [5, 0, -1]]
    slots = np.empty(8, np.int64)
    plan.fill_prefill_slots(tables, i32(3, 0, 2), i32(2, 0, 6), 4, slots)
    assert slots.tolist() == [39, 16, 22, 23, 0, 1, 2, 3]
    plan.fill_slots(tables[::2].copy(), i32(4, 7), 4, slots[:2])
    assert slots[:2].tolist() == [16, 3]
    plan.fill_suffix_tables(i32(3, 1, 8, 6, 2, 0), 5, 4, tables)
    assert tables.tolist() == [[3, 1, -1], [8, 6, -1], [2, 0, -1]]
    with pytest.raises(
        PageError, match="row 1 has no page for position 8: its table holds at most 3 pages of 4"
    ):
        plan.fill_slots(tables, i32(1, 8, 1), 4, np.empty(3, np.int64))
    plan.fill_slots(np.full((1, 1), 2**31 - 1, np.int32), i32(5), 1024, slots[:1])
    assert slots[0] == (2**31 - 1) * 1024 + 5


def read_only(array):
    array.flags.writeable = False
    return array


@both
@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, [[0, 1]], "tables must be a contiguous 2-d int32 array, got list"),
        (
            0,
            np.zeros((1, 4), np.int32)[:, ::2],
            "tables must be a contiguous .* got 2-d int32, not contiguous",
        ),
        (0, i32(0, 1), "tables must be a contiguous 2-d int32 array, got 1-d int32"),
        (1, np.zeros(1, np.int64), "lens must be a contiguous 1-d int32 array, got 1-d int64"),
        (1, np.zeros(1, ">i4"), "lens must be a contiguous 1-d int32 array, got 1-d >i4"),
        (1, i32(0, 0), "lens has 2 entries: it must have 1"),
        (2, 0, "page_size is 0: it must be at least 1"),
        (3, np.zeros(1, np.int32), "slots must be a writable contiguous 1-d int64 array, got 1-d int32"),
        (3, read_only(np.zeros(1, np.int64)), "slots must be a writable .* got 1-d int64, read-only"),
    ],
)
def test_buffers_are_checked(impl, position, bad, message):
    args = [np.zeros((1, 2), np.int32), i32(0), 4, np.empty(1, np.int64)]
    args[position] = bad
    with pytest.raises(PageError, match=message):
        impl.fill_slots(*args)


# --- waves --------------------------------------------------------------------------------------------------


@both
def test_wave_literal(impl):
    pool = PagePool(64, page_size=4, planner=impl)
    with WavePages(pool) as wave:
        tables = wave.admit(i32(5, 3), i32(1, 2), 6)
        assert tables.prefix_tables.tolist() == [[0, 1], [2, -1]]
        assert tables.suffix_tables.tolist() == [[3, 4], [5, 6], [7, 8]]
        assert tables.group_of_sequence.tolist() == [0, 1, 1]
        assert tables.group_starts.tolist() == [0, 1, 3]
        arrays = (tables.prefix_tables, tables.suffix_tables, tables.group_of_sequence, tables.group_starts)
        assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
        assert wave.admit(i32(4), i32(1), 0).prefix_tables.tolist() == [[9]]
        assert pool.allocator.num_used == 10
    assert pool.allocator.num_used == 0


@settings(deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(0, 90), st.sampled_from([CPP, TWIN]))
def test_wave_takes_the_formula_and_gives_all_back(data, page_size, suffix_tokens, impl):
    prefix_lens = data.draw(int32s(0, 300, st.integers(1, 6)))
    num_rollouts = data.draw(int32s(1, 9, st.just(len(prefix_lens))))
    pool = PagePool(5000, page_size, impl)
    before = pool.allocator.allocate(data.draw(st.integers(0, 20)))
    sequences = int(num_rollouts.sum())
    expected = sum(-(-int(p) // page_size) for p in prefix_lens) + sequences * -(-suffix_tokens // page_size)
    if expected > pool.allocator.num_free:
        with pytest.raises(OutOfPages), WavePages(pool) as wave:
            wave.admit(prefix_lens, num_rollouts, suffix_tokens)
    else:
        with pytest.raises(ZeroDivisionError), WavePages(pool) as wave:
            tables = wave.admit(prefix_lens, num_rollouts, suffix_tokens)
            assert pool.allocator.num_used == expected + len(before)
            used = np.concatenate([before, tables.prefix_tables.ravel(), tables.suffix_tables.ravel()])
            assert sorted(used[used >= 0]) == sorted(set(used.tolist()) - {-1})
            raise ZeroDivisionError
    assert pool.allocator.num_used == len(before)


@both
def test_refused_wave_takes_no_page(impl):
    pool = PagePool(8, page_size=4, planner=impl)
    with WavePages(pool) as wave:
        with pytest.raises(OutOfPages, match="9 pages asked but 8 free"):
            wave.admit(i32(4), i32(2), 16)
        with pytest.raises(PageError, match=r"num_rollouts\[1\] is 0: it must be at least 1"):
            wave.admit(i32(4, 4), i32(1, 0), 4)
        with pytest.raises(PageError, match="page_size is 0"):
            PagePool(8, page_size=0, planner=impl)
        with pytest.raises(PageError, match="max_prefix_tokens is -1: it must be at least 0"):
            RollingPages(pool, max_sequences=1, max_prefix_tokens=-1, max_suffix_tokens=1)
        assert pool.allocator.num_used == 0


# --- sequences of varying length ----------------------------------------------------------------------------


@both
def test_step_literal(impl):
    pool = PagePool(10, page_size=2, planner=impl)
    with RollingPages(pool, max_sequences=4, max_prefix_tokens=4, max_suffix_tokens=4) as batch:
        assert batch.admit(i32(3, 1), i32(2, 1)) == slice(0, 3)
        assert [pool.allocator.ref_count(page) for page in range(4)] == [2, 2, 1, 0]
        assert batch.step() == 0
        assert batch.slots.tolist() == [6, 8, 10, -1]
        assert batch.step() == 0
        assert batch.slots.tolist() == [7, 9, 11, -1]
        batch.finished[0] = True
        assert batch.step() == 0
        assert batch.slots.tolist() == [6, 12, -1, -1]  # page 3 came back and is the lowest free one
        assert batch.suffix_tables.tolist() == [[4, 3], [5, 6], [-1, -1], [-1, -1]]
        assert (batch.num_live, batch.suffix_lens.tolist()) == (2, [3, 3, 0, 0])
        assert (batch.source_rows[:2].tolist(), batch.finished.any()) == ([1, 2], False)
        assert (batch.group_of_sequence[:2].tolist(), batch.group_starts.tolist()) == ([0, 1], [0, 1, 2])
        assert [pool.allocator.ref_count(page) for page in range(3)] == [1, 1, 1]
        batch.finished[0] = True
        assert batch.step() == 0
        assert batch.group_starts.tolist() == [0, 0, 1]
        assert batch.admit(i32(4), i32(3)) == slice(1, 4)
        assert batch.prefix_tables[:2].tolist() == [[2, -1], [0, 1]]
        assert (batch.prefix_lens[:2].tolist(), batch.group_starts.tolist()) == ([1, 4], [0, 1, 4])
        with pytest.raises(
            PageError, match="row 0 has no page for position 4: its table holds at most 2 pages"
        ):
            batch.step()
        with pytest.raises(PageError, match="5 sequences would be live: the batch has 4 rows"):
            batch.admit(i32(1), i32(1))
        batch.finished[0] = True
        assert batch.step() == 0
        with pytest.raises(PageError, match="a prefix has 5 tokens: the batch takes at most 4"):
            batch.admit(i32(5), i32(1))
    assert pool.allocator.num_used == 0


@both
def test_short_step_retires_but_grows_nobody(impl):
    pool = PagePool(3, page_size=1, planner=impl)
    with RollingPages(pool, max_sequences=3, max_prefix_tokens=0, max_suffix_tokens=3) as batch:
        batch.admit(i32(0), i32(3))
        assert batch.step() == 0
        batch.finished[0] = True
        assert batch.step() == 1
        assert (batch.num_live, batch.suffix_lens.tolist()) == (2, [1, 1, 0])
        batch.finished[1] = True
        assert batch.step() == 0
        assert (batch.num_live, batch.suffix_tables.tolist()[0], batch.slots.tolist()) == (
            1,
            [1, 0, -1],
            [0, -1, -1],
        )


class Served:
    """A toy sampler: writes a number for every token to its slot and reads live sequences back every step."""

    def __init__(self, impl, num_pages, page_size):
        self.pool = PagePool(num_pages, page_size, impl)
        self.storage = np.full(num_pages * page_size, -1, np.int64)
        self.tokens: list[tuple[int, int]] = []  # (prefix number, sequence number) of each row
        self.batch = RollingPages(self.pool, max_sequences=12, max_prefix_tokens=20, max_suffix_tokens=15)

    def num_fitting(self, prefix_lens, num_rollouts):
        """How many leading groups find pages for their prefixes and a first token, and rows, at once."""
        pages = np.cumsum(-(-prefix_lens // self.pool.page_size) + num_rollouts)
        free, rows = self.pool.allocator.num_free, 12 - self.batch.num_live
        return int(((pages <= free) & (num_rollouts.cumsum() <= rows)).sum())

    def admit(self, prefix_lens, num_rollouts, sequences):
        rows = self.batch.admit(prefix_lens, num_rollouts)
        groups = slice(self.batch.num_groups - len(prefix_lens), self.batch.num_groups)
        slots = np.empty(prefix_lens.sum(), np.int64)
        tables = self.batch.prefix_tables[groups]
        self.pool.planner.fill_prefill_slots(tables, 0 * prefix_lens, prefix_lens, self.pool.page_size, slots)
        prefixes = [sequences[start] for start in np.cumsum(num_rollouts) - num_rollouts]
        values = [
            1000 * number + i for number, n in zip(prefixes, prefix_lens, strict=True) for i in range(n)
        ]
        self.storage[slots] = values
        firsts = np.repeat(prefixes, num_rollouts).tolist()
        self.tokens += zip(firsts, sequences, strict=True)
        assert len(self.tokens) == rows.stop

    def step(self):
        num_short = self.batch.step()
        self.tokens = [self.tokens[row] for row in self.batch.source_rows[: self.batch.num_live]]
        if num_short == 0:
            for row, (_, sequence) in enumerate(self.tokens):
                position = self.batch.suffix_lens[row] - 1
                self.storage[self.batch.slots[row]] = -1000 * sequence - position - 2
        return num_short

    def check(self):
        batch, page_size = self.batch, self.pool.page_size
        for row, (prefix, sequence) in enumerate(self.tokens):
            group = batch.group_of_sequence[row]
            assert batch.group_starts[group] <= row < batch.group_starts[group + 1]
            for table, n, start, sign in (
                (batch.prefix_tables[group], batch.prefix_lens[group], 1000 * prefix, 1),
                (batch.suffix_tables[row], batch.suffix_lens[row], -1000 * sequence - 2, -1),
            ):
                slots = [table[p // page_size] * page_size + p % page_size for p in range(n)]
                assert self.storage[slots].tolist() == [start + sign * p for p in range(n)]

    def state(self):
        batch = self.batch
        arrays = (
            batch.prefix_tables,
            batch.suffix_tables,
            batch.suffix_lens,
            batch.slots,
            batch.group_of_sequence,
        )
        return [batch.num_live, batch.num_groups, self.pool.allocator.num_free, *(a.tolist() for a in arrays)]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(12, 30), st.integers(1, 4))
def test_continuous_batching_with_preemption(data, num_pages, page_size):
    """Random arrivals, ends and preemptions: nobody's tokens are ever overwritten, and both kinds agree."""
    servers = [Served(impl, num_pages, page_size) for impl in (CPP, TWIN)]
    lead, batch = servers[0], servers[0].batch
    next_sequence = 1
    for _ in range(25):
        lens = data.draw(int32s(0, 20, st.integers(0, 2)))
        rollouts = data.draw(int32s(1, 4, st.just(len(lens))))
        fitting = lead.num_fitting(lens, rollouts)
        sequences = list(range(next_sequence, next_sequence + int(rollouts[:fitting].sum())))
        next_sequence += len(sequences)
        ended = batch.suffix_lens[: batch.num_live] >= 15
        ended[data.draw(st.lists(st.integers(0, len(ended) - 1), max_size=2)) if len(ended) else []] = True
        for server in servers:
            server.batch.finished[: len(ended)] = ended
            server.admit(lens[:fitting], rollouts[:fitting], sequences)
        while any(shorts := [server.step() for server in servers]):
            assert shorts[0] == shorts[1]
            for server in servers:
                server.batch.finished[server.batch.num_live - 1] = True  # preempt the youngest
        for server in servers:
            server.check()
        assert servers[0].state() == servers[1].state()
    for server in servers:
        server.batch.release()
        assert server.pool.allocator.num_used == 0


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_step_agrees_on_any_input(data):
    rows, num_groups, width, page_size = 5, 3, 3, data.draw(st.integers(1, 4))
    pages = data.draw(st.permutations(range(rows * width + num_groups)))
    tables = np.array(pages[: rows * width], np.int32).reshape(rows, width)
    lens = data.draw(int32s(0, 3 * page_size - 1, st.just(rows)) | int32s(-1, 3 * page_size, st.just(rows)))
    tables[np.arange(width) >= -(-lens[:, None] // page_size)] = -1
    prefixes = np.array(pages[rows * width :], np.int32).reshape(num_groups, 1)
    groups = data.draw(int32s(0, 2, st.just(rows)) | int32s(-1, 3, st.just(rows)))
    finished = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    num_live = data.draw(usually(st.integers(0, rows), st.sampled_from([-1, rows + 1])))
    extra = data.draw(st.integers(0, 4))
    results = []
    for kind in (CPP, TWIN):
        allocator = kind.PageAllocator(len(pages) + extra)
        allocator.allocate(len(pages))
        allocator.retain(np.repeat(prefixes.ravel(), 4))
        buffers = [array.copy() for array in (prefixes, tables, groups, lens, finished)]
        slots, source_rows = np.full(rows, 7, np.int64), np.full(rows, 7, np.int32)
        result = outcome(kind.step, allocator, *buffers, num_live, page_size, slots, source_rows)
        arrays = [*buffers, slots, source_rows]
        if refused(result):
            assert all(
                (a == b).all()
                for a, b in zip(buffers, (prefixes, tables, groups, lens, finished), strict=True)
            )
            assert allocator.num_used == len(pages)
        counts = [allocator.ref_count(page) for page in range(allocator.num_pages)]
        results.append((result, counts, [array.tolist() for array in arrays]))
    assert results[0] == results[1]


# --- choice of implementation -------------------------------------------------------------------------------


def test_without_the_extension_the_twin_works_and_the_default_is_refused(monkeypatch):
    import sip_engine

    monkeypatch.delattr(sip_engine, "_csrc")
    monkeypatch.setitem(sys.modules, "sip_engine._csrc", None)
    assert PagePool(3, page_size=1, planner=TWIN).allocator.allocate(2).tolist() == [0, 1]
    with pytest.raises(ConfigError, match=r"planner cannot be loaded .* install the package"):
        PagePool(3, page_size=1)
