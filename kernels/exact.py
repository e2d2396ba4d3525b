"""Matrix products and attention whose bits depend on their operands only: not on batch, blocking, order or shards.

Operands are written as integers on a common power-of-two grid, so small that float64 holds every partial sum
exactly (the idea of Ozaki et al., Numerical Algorithms 59, 2012). A sum of exact integers is the same in any
order; one elementwise rounding at the end is the same everywhere. Two slices keep about 2 * `slice_bits` bits,
more than float32 has. Plain torch, any device with float64; about three float64 products for one float32 product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Across = Callable[[Tensor], Tensor]
"""Combines a tensor with other shards' (their maximum, their sum); the identity without shards."""


def alone(x: Tensor) -> Tensor:
    """The combination of a single shard."""
    return x


class Sliced(NamedTuple):
    """x = (high + low * 2**-bits) / scale, up to 2**-(2 * bits) of the largest |x| along a dim; all float64."""

    high: Tensor
    low: Tensor
    scale: Tensor


def slice_bits(num_terms: int) -> int:
    """Bits of a slice for which sums of `num_terms` products of slices stay within float64's 53."""
    return (53 - max(1, num_terms - 1).bit_length()) // 2


def slice_along(x: Tensor, dim: int, bits: int, across_max: Across = alone) -> Sliced:
    """Slice `x` with a scale for each index but those of `dim` (kept with size 1)."""
    largest = across_max(x.detach().abs().amax(dim, keepdim=True).double())
    exponent = torch.frexp(largest)[1]
    scale = torch.ldexp(torch.ones_like(largest), bits - exponent)
    scaled = x.double() * scale
    high = scaled.round()
    return Sliced(high, ((scaled - high) * 2.0**bits).round(), scale)


def _product(a: Sliced, b: Sliced, bits: int, across_sum: Across = alone) -> Tensor:
    """a [..., M, K] @ b [..., K, N] in float64, from three exact products."""
    main = across_sum(a.high @ b.high)
    cross = across_sum(a.high @ b.low + a.low @ b.high)
    return (main + cross * 2.0**-bits) / (a.scale * b.scale)


def exact_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_terms: int | None = None,
    across_max: Across = alone,
    across_sum: Across = alone,
) -> Tensor:
    """x [N, K] times weight [M, K] transposed, plus bias [M] -> [N, M] in x's dtype.

    Where K is sharded, `num_terms` is K of all shards, and the callables combine over them.
    """
    bits = slice_bits(num_terms or x.shape[1])
    left, right = slice_along(x, 1, bits, across_max), slice_along(weight.T, 0, bits, across_max)
    y = _product(left, right, bits, across_sum)
    return (y if bias is None else y + bias.double()).to(x.dtype)


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, *, max_keys: int | None = None
) -> Tensor:
    """softmax(scale * q kᵀ) v over visible keys; keys that nobody sees may be anything finite.

    q [..., M, D], k and v [..., L, D], visible bool [..., M, L] -> [..., M, D] in q's dtype. A query that
    sees no key gives 0. `max_keys` (L unless given) sets the grid: calls agree in their bits where it is equal.
    """
    head_bits, key_bits = slice_bits(q.shape[-1]), slice_bits(max_keys or k.shape[-2])
    logits = _product(
        slice_along(q, -1, head_bits), slice_along(k.transpose(-1, -2), -2, head_bits), head_bits
    )
    logits = (logits * scale).masked_fill(~visible, float("-inf"))
    largest = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - largest.masked_fill(largest.isneginf(), 0.0))
    # The largest weight is 1, whatever else is there: a fixed grid serves all of them.
    ones = torch.ones_like(largest)
    high = (weights * 2.0**key_bits).round()
    sliced = Sliced(high, ((weights * 2.0**key_bits - high) * 2.0**key_bits).round(), ones * 2.0**key_bits)
    total = (
        sliced.high.sum(-1, keepdim=True) + sliced.low.sum(-1, keepdim=True) * 2.0**-key_bits
    ) / sliced.scale
    seen_values = v.masked_fill(~visible.any(-2).unsqueeze(-1), 0.0)
    mixed = _product(sliced, slice_along(seen_values, -2, key_bits), key_bits)
    return (mixed / total.masked_fill(total == 0, 1.0)).to(q.dtype)
