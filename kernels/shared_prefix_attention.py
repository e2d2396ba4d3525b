"""Attention over a packed stream in which every suffix sees its row's prefix and itself only.

Shape legend: T tokens of the stream, H query heads, G key/value heads (H a multiple of G), D head dim,
R rows. A row is one prefix followed by its suffixes; rows follow one another without padding.

For a query at stream index i and a key at j of the same row:
    visible(i, j) = j <= i  and  (segment(j) == segment(i)  or  segment(j) is the row's prefix)
    out_i = sum_j softmax_j(scale * q_i . k_j) v_j     over visible j
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


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
    def num_tokens(self) -> int:
        return sum(self.row_lens)

    @cached_property
    def positions(self) -> Tensor:
        """[T] int64: a suffix continues its prefix's positions."""
        runs = []
        for prefix, suffixes in zip(self.prefix_lens, self.suffix_lens, strict=True):
            runs.append(torch.arange(prefix))
            runs.extend(torch.arange(prefix, prefix + n) for n in suffixes)
        return torch.cat(runs).to(self.device)

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
        return torch.stack(rows).to(self.device)

    @cached_property
    def stream_index(self) -> Tensor:
        """[T] int64: the padded cell (row * longest + column) of each stream token."""
        longest = max(self.row_lens)
        runs = [torch.arange(n) + r * longest for r, n in enumerate(self.row_lens)]
        return torch.cat(runs).to(self.device)

    @cached_property
    def visible(self) -> Tensor:
        """[R, longest, longest] bool: the definition above, cell by cell."""
        longest = max(self.row_lens)
        segment = torch.zeros(len(self.row_lens), longest, dtype=torch.int64)
        for r, (prefix, suffixes) in enumerate(zip(self.prefix_lens, self.suffix_lens, strict=True)):
            start = prefix
            for number, n in enumerate(suffixes, start=1):
                segment[r, start : start + n] = number
                start += n
        same = segment[:, :, None] == segment[:, None, :]
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        return (causal & (same | (segment == 0)[:, None, :])).to(self.device)

    def is_uniform(self) -> bool:
        """True when every row has the same length, so that the stream reshapes to rows for free."""
        return len(set(self.row_lens)) == 1


def shared_prefix_attention_reference(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: RowLayout, scale: float
) -> Tensor:
    """The definition, differentiable, in the inputs' dtype: rows padded to the longest, one masked softmax."""
    uniform = layout.is_uniform()
    num_rows, longest = len(layout.row_lens), max(layout.row_lens)

    def to_rows(x: Tensor) -> Tensor:
        rows = (
            x.reshape(num_rows, longest, *x.shape[1:]) if uniform else x[layout.padded_index]
        )  # [R, longest, heads, D]
        return rows.transpose(1, 2)

    share = q_THD.shape[1] // k_TGD.shape[1]
    q, k, v = to_rows(q_THD), to_rows(k_TGD), to_rows(v_TGD)
    if share > 1:
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    # A row's padding lies behind its tokens, so plain causal attention never sees it.
    mask = None if layout.is_causal else layout.visible[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    out = out.transpose(1, 2).reshape(num_rows * longest, *q_THD.shape[1:])
    return out if uniform else out[layout.stream_index]


def shared_prefix_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    layout: RowLayout,
    *,
    scale: float,
    impl: Literal["reference"] = "reference",
) -> Tensor:
    """Attention of a packed stream; returns [T, H, D] in the inputs' dtype.

    Raises:
        ValueError: the stream's length is not the layout's, or `impl` is unknown.
    """
    if q_THD.shape[0] != layout.num_tokens:
        raise ValueError(f"stream of {q_THD.shape[0]} tokens, but the layout's rows hold {layout.num_tokens}")
    if impl != "reference":
        raise ValueError(f"impl={impl!r}: shared_prefix_attention has only 'reference'")
    return shared_prefix_attention_reference(q_THD, k_TGD, v_TGD, layout, scale)


def rows_of(
    prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]], device: torch.device
) -> RowLayout:
    """A `RowLayout` from any sequences of lengths."""
    return RowLayout(tuple(prefix_lens), tuple(tuple(s) for s in suffix_lens), device)
