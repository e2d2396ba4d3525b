"""Types of the compiled host extension; tests/page_twin.py defines what each function computes."""

import numpy as np
from numpy.typing import NDArray

class PageAllocator:
    def __init__(self, num_pages: int) -> None: ...
    def allocate(self, count: int) -> NDArray[np.int32]: ...
    def retain(self, pages: NDArray[np.int32]) -> None: ...
    def release(self, pages: NDArray[np.int32]) -> None: ...
    def ref_count(self, page: int) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_used(self) -> int: ...
    @property
    def num_pages(self) -> int: ...

def num_wave_pages(
    prefix_lens: NDArray[np.int32], num_rollouts: NDArray[np.int32], suffix_tokens: int, page_size: int
) -> int: ...
def fill_prefix_tables(
    pages: NDArray[np.int32], prefix_lens: NDArray[np.int32], page_size: int, tables: NDArray[np.int32]
) -> None: ...
def fill_suffix_tables(
    pages: NDArray[np.int32], suffix_tokens: int, page_size: int, tables: NDArray[np.int32]
) -> None: ...
def fill_slots(
    tables: NDArray[np.int32], lens: NDArray[np.int32], page_size: int, slots: NDArray[np.int64]
) -> None: ...
def fill_prefill_slots(
    tables: NDArray[np.int32],
    starts: NDArray[np.int32],
    lens: NDArray[np.int32],
    page_size: int,
    slots: NDArray[np.int64],
) -> None: ...
def step(
    allocator: PageAllocator,
    prefix_tables: NDArray[np.int32],
    suffix_tables: NDArray[np.int32],
    group_of_sequence: NDArray[np.int32],
    suffix_lens: NDArray[np.int32],
    finished: NDArray[np.bool_],
    num_live: int,
    page_size: int,
    slots: NDArray[np.int64],
    source_rows: NDArray[np.int32],
) -> tuple[int, int]: ...
