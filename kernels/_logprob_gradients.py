"""Gradients of the log-prob head on CUDA, a chunk of dlogits at a time, with our sums or the vendor's."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sip_engine.kernels import _logprob_triton as fused


class _OwnSums:
    """d hidden and d weight of the chunks so far, by our kernel.

    Sums of several chunks meet in 16 bits; `low` keeps what rounding takes from them.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, chunk_columns: int) -> None:
        new = partial(torch.empty, dtype=hidden.dtype, device=hidden.device)
        narrow, size = hidden.dtype.itemsize == 2, hidden.shape[1]
        self.d_hidden, self.d_weight = new(hidden.shape), new(weight.shape)
        several_columns, several_rows = len(weight) > fused.CHUNK_COLUMNS, len(hidden) > fused.CHUNK_ROWS
        self._low_hidden = new(len(hidden), size) if narrow and several_columns else None
        self._low_weight = new(chunk_columns, size) if narrow and several_rows else None

    def add(self, dlogits: Tensor, h: Tensor, w: Tensor, rows: slice, columns: slice) -> None:
        """The chunk of these rows and columns; `dlogits` is whole tiles, more than its own."""
        low = None if self._low_hidden is None else self._low_hidden[rows]
        fused._launch_accumulate(
            dlogits, w, self.d_hidden[rows], low, add=columns.start > 0, transposed=False
        )
        out = self.d_weight[columns]
        fused._launch_accumulate(dlogits, h, out, self._low_weight, add=rows.start > 0, transposed=True)

    def results(self) -> tuple[Tensor, Tensor]:
        return self.d_hidden, self.d_weight


class _LibrarySums:
    """The same by torch's matrix product. Sums of several chunks meet in float32, as many bytes as two of 16 bits."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk_columns: int) -> None:
        several_columns, several_rows = len(weight) > fused.CHUNK_COLUMNS, len(hidden) > fused.CHUNK_ROWS
        self._dtype, size = hidden.dtype, hidden.shape[1]
        kept = torch.float32 if several_columns else hidden.dtype
        self._d_hidden = torch.empty(hidden.shape, dtype=kept, device=hidden.device)
        self._d_weight = torch.empty(weight.shape, dtype=hidden.dtype, device=hidden.device)
        self._chunk: Tensor | None = None
        if several_rows and hidden.dtype != torch.float32:
            self._chunk = torch.empty(chunk_columns, size, dtype=torch.float32, device=hidden.device)
        self._num_rows = len(hidden)

    def add(self, dlogits: Tensor, h: Tensor, w: Tensor, rows: slice, columns: slice) -> None:
        """The chunk of these rows and columns; `dlogits` is whole tiles, more than its own."""
        dlogits = dlogits[: len(h), : len(w)]
        _add_product(self._d_hidden[rows], dlogits, w, add=columns.start > 0)
        out = self._d_weight[columns]
        chunk = out if self._chunk is None else self._chunk[: len(w)]
        _add_product(chunk, dlogits.T, h, add=rows.start > 0)
        if chunk is not out and rows.stop >= self._num_rows:
            out.copy_(chunk)

    def results(self) -> tuple[Tensor, Tensor]:
        return self._d_hidden.to(self._dtype), self._d_weight


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out (+)= a @ b, summed in float32; where `out` is wider than a and b it is never rounded to their type."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=float(add), out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, out.dtype, beta=float(add), out=out)
    else:  # the CPU's product has no wider result
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(add), out=out)


def launch_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    vocab_start: int,
    sums: type[_OwnSums] | type[_LibrarySums] = _OwnSums,
) -> tuple[Tensor, Tensor]:
    """d hidden [N, H] and d weight [V, H] in the inputs' dtype, given log-sum-exp and grad [N] in float32."""
    num_rows, num_columns = hidden.shape[0], weight.shape[0]
    hidden, weight = fused._with_unit_stride(hidden), fused._with_unit_stride(weight)
    targets, grad = targets.contiguous(), grad.contiguous()
    shape = fused._dlogits_shape(
        min(num_rows, fused.CHUNK_ROWS), min(num_columns, fused.CHUNK_COLUMNS), hidden.element_size()
    )
    dlogits = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
    total = sums(hidden, weight, shape[1])
    for column in range(0, num_columns, fused.CHUNK_COLUMNS):
        columns = slice(column, column + fused.CHUNK_COLUMNS)
        for row in range(0, num_rows, fused.CHUNK_ROWS):
            rows = slice(row, row + fused.CHUNK_ROWS)
            h, w = hidden[rows], weight[columns]
            fused._launch_dlogits(h, w, targets[rows], lse[rows], grad[rows], dlogits, vocab_start + column)
            total.add(dlogits, h, w, rows, columns)
    return total.results()


launch_gradients_library = partial(launch_gradients, sums=_LibrarySums)
"""The two sums by the vendor's matrix product."""
