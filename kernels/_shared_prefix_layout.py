"""The layout of a packed stream: lengths of its rows, and the index tables that attention needs of them.

A row is one prefix followed by its suffixes; rows follow one another without padding. Prefixes and suffixes
are the stream's segments. Every table is built on the host, once, and moved to the layout's device: a layout
serves all layers of a micro-batch, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sip_engine.kernels._transfer import place

Table = TypeVar("Table")


@dataclass(frozen=True)
class RowLayout:
    """Lengths of a stream's rows: prefix tokens and the tokens of each suffix. A prefix may be empty."""

    prefix_lens: tuple[int, ...]
    suffix_lens: tuple[tuple[int, ...], ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def row_lens(self) -> tuple[int, ...]:
        return tuple(p + sum(s) for p, s in zip(self.prefix_lens, self.suffix_lens, strict=True))

    @cached_property
    def row_starts(self) -> tuple[int, ...]:
        """Stream index of each row's first token, and the number of tokens: one more than rows."""
        return (0, *np.cumsum(self.row_lens, dtype=np.int64).tolist())

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.row_lens)

    @cached_property
    def positions(self) -> Tensor:
        """[T] int64: a suffix continues its prefix's positions."""
        runs = []
        for prefix, suffixes in zip(self.prefix_lens, self.suffix_lens, strict=True):
            runs.append(torch.arange(prefix))
            runs.extend(torch.arange(prefix, prefix + n) for n in suffixes)
        return place(torch.cat(runs), self.device)

    @cached_property
    def is_causal(self) -> bool:
        """True when no row holds more than one suffix: plain causal attention."""
        return all(len(s) <= 1 for s in self.suffix_lens)

    @cached_property
    def padded_index(self) -> Tensor:
        """[R, longest row] int64: stream index of each cell; cells past a row's end repeat its last token."""
        rows, start = [], 0
        longest = max(self.row_lens)
        for length in self.row_lens:
            rows.append(torch.arange(longest).clamp(max=length - 1) + start)
            start += length
        return place(torch.stack(rows), self.device)

    @cached_property
    def stream_index(self) -> Tensor:
        """[T] int64: the padded cell (row * longest + column) of each stream token."""
        longest = max(self.row_lens)
        runs = [torch.arange(n) + r * longest for r, n in enumerate(self.row_lens)]
        return place(torch.cat(runs), self.device)

    @cached_property
    def visible(self) -> Tensor:
        """[R, longest, longest] bool: which key (last) each query sees, cell by cell."""
        longest = max(self.row_lens)
        segment = torch.zeros(len(self.row_lens), longest, dtype=torch.int64)
        for r, (prefix, suffixes) in enumerate(zip(self.prefix_lens, self.suffix_lens, strict=True)):
            start = prefix
            for number, n in enumerate(suffixes, start=1):
                segment[r, start : start + n] = number
                start += n
        same = segment[:, :, None] == segment[:, None, :]
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        return place(causal & (same | (segment == 0)[:, None, :]), self.device)

    def is_uniform(self) -> bool:
        """True when every row has the same length, so that the stream reshapes to rows for free."""
        return len(set(self.row_lens)) == 1

    @cached_property
    def segment_lens(self) -> tuple[int, ...]:
        """Tokens of each prefix and suffix in stream order, without the empty ones."""
        rows = zip(self.prefix_lens, self.suffix_lens, strict=True)
        return tuple(n for prefix, suffixes in rows for n in (prefix, *suffixes) if n)

    @cached_property
    def _segment_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First token, and first token after the last, of each token's segment: [T] int32 each."""
        lens = np.array(self.segment_lens, np.int64)
        ends = np.repeat(np.cumsum(lens), lens).astype(np.int32)
        return ends - np.repeat(lens, lens).astype(np.int32), ends

    @cached_property
    def segment_start(self) -> Tensor:
        """[T] int32: stream index of the first token of each token's segment.

        Query i sees its row's prefix and the keys segment_start[i] <= j <= i.
        """
        return self._to_device(self._segment_bounds[0])

    @cached_property
    def seen_until(self) -> Tensor:
        """[T] int32: the key j is seen by the queries j <= i < seen_until[j], whatever its segment."""
        until = self._segment_bounds[1].copy()
        for start, end, prefix in zip(self.row_starts, self.row_starts[1:], self.prefix_lens, strict=False):
            until[start : start + prefix] = end
        return self._to_device(until)

    def query_tiles(self, block: int) -> Tensor:
        """[tiles, 6] int32: runs of at most `block` queries of one row's prefix, or of its suffixes.

        Columns: first query; end of the run; first token of the row; number of keys seen because they are
        the row's prefix (0 for the prefix's own queries); first key of the first query's segment; number of
        keys that every query of the run sees, counted through the former keys and then from the latter.
        The runs that see the most keys come first, so that the last ones to run are short.
        """
        return self.once(("query_tiles", block), lambda: self._tile_queries(block))

    def key_tiles(self, block: int) -> Tensor:
        """[tiles, 4] int32: runs of at most `block` keys of one row's prefix, or of its suffixes.

        Columns: first key; end of the run; the first query from which on every query that sees a key of
        the run sees them all; the end of the queries that see any. Longest first, as `query_tiles`.
        """
        return self.once(("key_tiles", block), lambda: self._tile_keys(block))

    def _runs(self, block: int) -> list[tuple[int, int, int, int, int]]:
        """First token, end, row start, prefix length and row end of each run of at most `block` tokens."""
        runs = []
        for start, end, prefix in zip(self.row_starts, self.row_starts[1:], self.prefix_lens, strict=False):
            for first, last in ((start, start + prefix), (start + prefix, end)):
                for i in range(first, last, block):
                    runs.append((i, min(i + block, last), start, prefix, end))
        return runs

    def _tile_queries(self, block: int) -> Tensor:
        begins, _ = self._segment_bounds
        tiles = []
        for first, last, start, prefix, _ in self._runs(block):
            if first < start + prefix:
                tiles.append((first, last, start, 0, start, first - start))
                continue
            own = int(begins[first])
            shared = first - own if begins[last - 1] == own else 0
            tiles.append((first, last, start, prefix, own, prefix + shared))
        tiles.sort(key=lambda tile: tile[4] - tile[3] - tile[1])  # minus the number of keys
        return self._to_device(np.array(tiles, np.int32).reshape(-1, 6))

    def _tile_keys(self, block: int) -> Tensor:
        begins, ends = self._segment_bounds
        tiles = []
        for first, last, start, prefix, end in self._runs(block):
            until = end if first < start + prefix else int(ends[last - 1])
            seen_by_all = last if begins[first] == begins[last - 1] else until
            tiles.append((first, last, seen_by_all, until))
        tiles.sort(key=lambda tile: tile[0] - tile[3])
        return self._to_device(np.array(tiles, np.int32).reshape(-1, 4))

    @cached_property
    def _tables(self) -> dict[Any, Any]:
        return {}

    def once(self, key: Any, build: Callable[[], Table]) -> Table:
        """What `build` returned the first time it was asked for under this key, kept as long as the layout."""
        if key not in self._tables:
            self._tables[key] = build()
        return self._tables[key]

    def _to_device(self, values: np.ndarray) -> Tensor:
        return place(torch.from_numpy(values), self.device)


def rows_of(
    prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]], device: torch.device
) -> RowLayout:
    """A `RowLayout` from any sequences of lengths."""
    return RowLayout(tuple(prefix_lens), tuple(tuple(s) for s in suffix_lens), device)
