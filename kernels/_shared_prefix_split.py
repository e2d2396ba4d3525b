"""Shared-prefix attention on a CPU by torch's flash attention, in three unmasked parts that are joined.

The definition pads all rows to the longest, and a row's prefix and suffixes into one square mask, most of which is
empty when there are many. Here a row with one suffix is one causal part. Else the prefix attends to itself (causal),
all suffixes of a row together to the prefix, and each suffix to itself (causal). The two parts of a suffix are joined
by log-sum-exp,

    lse = log(exp(lse_1) + exp(lse_2)),   out = sum_i exp(lse_i - lse) out_i,

and the backward pass of each part is fed the joint out and lse, so that it finds its share of the joint gradients.
Nothing is padded: consecutive rows of one shape are views of the stream. Only keys and values of grouped heads are
copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sip_engine.kernels._shared_prefix_layout import RowLayout

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """Queries that attend to one range of keys, as places in the stream: `rows` of them, `stride` tokens apart."""

    start: int
    rows: int
    stride: int
    queries: tuple[int, int]
    """First query and number of queries, from the row's start."""
    keys: tuple[int, int]
    causal: bool
    """Queries see the keys up to their own place; otherwise all, and the part is joined to what they saw before."""

    def view(self, x_THD: Tensor, span: tuple[int, int]) -> Tensor:
        """[T, H, D] -> [rows, H, span tokens, D], without a copy."""
        (first, length), (token, head, channel) = span, x_THD.stride()
        shape = (self.rows, x_THD.shape[1], length, x_THD.shape[2])
        offset = x_THD.storage_offset() + (self.start + first) * token
        return x_THD.as_strided(shape, (self.stride * token, head, token, channel), offset)


def parts_of(layout: RowLayout) -> list[Part]:
    """All parts of a layout; what suffixes see of themselves comes before what they see of their prefix."""
    return layout.once("split", lambda: list(_build(layout)))


def _build(layout: RowLayout) -> Iterator[Part]:
    shapes = zip(layout.row_starts, layout.prefix_lens, layout.suffix_lens, strict=False)
    for (prefix, suffixes), run in groupby(shapes, key=lambda row: row[1:]):
        starts = [start for start, *_ in run]
        first, count, total = starts[0], len(starts), sum(suffixes)
        stride = prefix + total
        if len(suffixes) <= 1:  # a suffix alone goes on from its prefix as if it were part of it
            yield Part(first, count, stride, (0, stride), (0, stride), True)
            continue
        if prefix:
            yield Part(first, count, stride, (0, prefix), (0, prefix), True)
        if count == 1 and total and len(set(suffixes)) == 1:
            whole = (0, suffixes[0])
            yield Part(first + prefix, len(suffixes), suffixes[0], whole, whole, True)
        else:
            at = prefix
            for length in suffixes:
                if length:
                    yield Part(first, count, stride, (at, length), (at, length), True)
                at += length
        if prefix and total:
            yield Part(first, count, stride, (prefix, total), (0, prefix), False)


class _SplitAttention(torch.autograd.Function):
    """Keeps q, k, v, out [T, H, D] and lse [T, H]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, scale: float) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        for part in parts_of(layout):
            at, keys = part.queries, part.keys
            found, log_sum = _forward(
                part.view(q, at), part.view(k, keys), part.view(v, keys), 0.0, part.causal, scale=scale
            )
            out_here, lse_here = part.view(out, at), part.view(lse[..., None], at)[..., 0]
            if not part.causal:
                joint = torch.logaddexp(log_sum, lse_here)
                weight, weight_before = ((x - joint).exp()[..., None] for x in (log_sum, lse_here))
                found, log_sum = weight * found + weight_before * out_here, joint
            out_here.copy_(found)
            lse_here.copy_(log_sum)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
        for part in parts_of(ctx.layout):
            at, keys = part.queries, part.keys
            found = _backward(
                part.view(grad, at),
                part.view(q, at),
                part.view(k, keys),
                part.view(v, keys),
                part.view(out, at),
                part.view(lse[..., None], at)[..., 0],
                0.0,
                part.causal,
                scale=ctx.scale,
            )
            for total, share, span in zip((dq, dk, dv), found, (at, keys, keys), strict=True):
                part.view(total, span).add_(share)
        return dq, dk, dv, None, None


def shared_prefix_attention_split(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: RowLayout, scale: float
) -> Tensor:
    """[T, H, D], differentiable, any floating dtype; see `shared_prefix_attention`."""
    if q_THD.is_cuda:
        raise ValueError("impl='split' runs on the CPU: pass impl='triton' or 'reference' for a CUDA tensor")
    share = q_THD.shape[1] // k_TGD.shape[1]
    if share > 1:
        k_TGD, v_TGD = k_TGD.repeat_interleave(share, dim=1), v_TGD.repeat_interleave(share, dim=1)
    out: Any = _SplitAttention.apply(q_THD, k_TGD, v_TGD, layout, scale)
    return out
