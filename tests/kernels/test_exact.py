"""Exact products: close to float64, and the same bits for any batch, order, padding or number of shards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sip_engine.kernels.exact import exact_attention, exact_linear, slice_along, slice_bits


def draw(*shape: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    """Normal numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(
        spread * torch.randn(shape, generator=generator)
    )


@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 30),
    st.integers(0, 99),
    st.sampled_from([0.0, 1.0, 4.0]),
)
def test_linear_is_as_good_as_float64(n: int, k: int, m: int, seed: int, spread: float) -> None:
    x, w = draw(n, k, seed=seed, spread=spread), draw(m, k, seed=seed + 1, spread=spread)
    want = F.linear(x.double(), w.double())
    size = x.double().abs().amax(1, keepdim=True) * w.double().abs().amax(1)
    assert bool(((exact_linear(x.double(), w) - want).abs() <= 2.0**-34 * k * size).all())


def test_linear_has_the_same_bits_in_any_order_batch_and_number_of_shards() -> None:
    x, w, bias = draw(33, 96, seed=0), draw(17, 96, seed=1), draw(17, seed=2)
    want = exact_linear(x, w, bias)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    assert torch.equal(exact_linear(x[:, order], w[:, order], bias), want)
    assert torch.equal(torch.cat([exact_linear(row[None], w, bias) for row in x]), want)
    assert torch.equal(
        torch.cat([exact_linear(x, part, b) for part, b in zip(w.split(5), bias.split(5), strict=True)], 1),
        want,
    )
    for shards in (2, 3, 8):
        xs, ws = x.chunk(shards, 1), w.chunk(shards, 1)
        bits = slice_bits(96)
        largest = {
            id(whole): torch.stack([p.abs().amax(1) for p in parts]).amax(0).double()
            for whole, parts in ((x, xs), (w, ws))
        }
        scales = iter([largest[id(x)][:, None], largest[id(w)][None, :]] * shards)
        partial: list[list[torch.Tensor]] = []

        def collect(part: torch.Tensor, into: list[list[torch.Tensor]] = partial) -> torch.Tensor:
            into[-1].append(part)
            return part

        for a, b in zip(xs, ws, strict=True):
            partial.append([])
            exact_linear(a, b, num_terms=96, across_max=lambda _, s=scales: next(s), across_sum=collect)
        main, cross = (torch.stack([p[i] for p in partial]).sum(0) for i in (0, 1))
        sliced_x, sliced_w = slice_along(x, 1, bits), slice_along(w.T, 0, bits)
        y = (main + cross * 2.0**-bits) / (sliced_x.scale * sliced_w.scale)
        assert torch.equal((y + bias.double()).to(x.dtype), want)


def test_the_check_can_fail() -> None:
    """An ordinary product does change its bits with the order of its terms."""
    x, w = draw(33, 96, seed=0), draw(17, 96, seed=1)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(F.linear(x[:, order], w[:, order]), F.linear(x, w))


def test_attention_is_as_good_as_float64_and_ignores_padding_and_order() -> None:
    q, k, v = (
        draw(2, 3, 5, 16, seed=0, spread=0.5),
        draw(2, 3, 40, 16, seed=1, spread=0.5),
        draw(2, 3, 40, 16, seed=2),
    )
    visible = torch.rand(2, 1, 5, 40, generator=torch.Generator().manual_seed(4)) < 0.6
    visible[0, 0, 2] = False  # a query that sees nothing
    got = exact_attention(q, k, v, visible, 0.25)
    want = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=visible, scale=0.25
    ).nan_to_num(0.0)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    assert torch.equal(exact_attention(q, k[:, :, order], v[:, :, order], visible[..., order], 0.25), got)
    garbage = torch.full((2, 3, 9, 16), 1e30)
    wide = torch.cat([visible, torch.zeros(2, 1, 5, 9, dtype=torch.bool)], -1)
    keys, values = torch.cat([k, garbage], 2), torch.cat([v, garbage], 2)
    padded = exact_attention(q, keys, values, wide, 0.25, max_keys=500)
    assert torch.equal(padded, exact_attention(q, k, v, visible, 0.25, max_keys=500))


@pytest.mark.parametrize("terms", [1, 2, 3, 64, 1000, 2**20])
def test_slices_leave_room_for_every_sum(terms: int) -> None:
    bits = slice_bits(terms)
    assert terms * 2 ** (2 * bits) <= 2**53 < terms * 2 ** (2 * (bits + 2))
