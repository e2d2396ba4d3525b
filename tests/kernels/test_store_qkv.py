"""The packed projection to rotated queries and stored keys and values, against the separate steps in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from interpreter import DEVICE

from sip_engine.kernels.kv_layout import FP8
from sip_engine.kernels.kv_write import write_kv
from sip_engine.kernels.rotary import rotary
from sip_engine.kernels.store_qkv import split_qkv, store_qkv

IMPLS = ["reference", "triton"]


def case(tokens: int, groups: int, share: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(tokens * 31 + dim)
    mixed = torch.randn(tokens, groups * (share + 2) * dim, generator=rng).to(dtype)
    angles = torch.rand(50, dim // 2, generator=rng) * 6
    positions = torch.randint(0, 50, (tokens,), generator=rng)
    slots = torch.randperm(40, generator=rng)[:tokens]
    slots[::3] = -1
    return tuple(x.to(DEVICE) for x in (mixed, angles.cos(), angles.sin(), positions, slots))


def pages_like(groups: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (10, 4, groups, dim)
    if dtype == FP8:
        one = torch.full(shape, 0x11, dtype=torch.uint8, device=DEVICE)
        return one.view(FP8), one.clone().view(FP8)
    one = torch.full(shape, 7.0, dtype=dtype, device=DEVICE)
    return one, one.clone()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("groups", "share", "dim"), [(1, 1, 8), (2, 3, 16), (3, 2, 24), (2, 4, 64)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_it_equals_float64_step_by_step(impl, groups: int, share: int, dim: int, with_norm: bool) -> None:
    mixed, cos, sin, positions, slots = case(11, groups, share, dim, torch.float32)
    norms = [torch.linspace(0.5, 1.5, dim, device=DEVICE), torch.linspace(2, 1, dim, device=DEVICE)]
    k_pages, v_pages = pages_like(groups, dim, torch.float32)
    settings = {"q_norm": norms[0], "k_norm": norms[1], "eps": 1e-5} if with_norm else {}
    q = store_qkv(mixed, cos, sin, positions, k_pages, v_pages, slots, impl=impl, **settings)

    wide = mixed.double().cpu().numpy().reshape(11, groups, share + 2, dim)

    def rotated(x: np.ndarray, weight: torch.Tensor) -> np.ndarray:
        if with_norm:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight.double().cpu().numpy()
        a, b = np.split(x, 2, axis=-1)
        c, s = (table.double().cpu().numpy()[positions.cpu().numpy()][:, None, None] for table in (cos, sin))
        return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    want_q = rotated(wide[:, :, :share], norms[0]).reshape(11, groups * share, dim)
    np.testing.assert_allclose(q.cpu().numpy(), want_q, atol=2e-6)
    want_k, want_v = np.full((2, 40, groups, dim), 7.0)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want_k[slot] = rotated(wide[:, :, share : share + 1], norms[1])[token, :, 0]
            want_v[slot] = wide[token, :, share + 1]
    np.testing.assert_allclose(k_pages.flatten(0, 1).cpu().numpy(), want_k, atol=2e-6)
    assert (v_pages.flatten(0, 1).cpu().numpy() == want_v).all()


@pytest.mark.parametrize("pages", [torch.bfloat16, FP8])
def test_bits_are_those_of_the_separate_kernels(pages: torch.dtype) -> None:
    """Split, rotary and write_kv one after the other, in bfloat16."""
    mixed, cos, sin, positions, slots = case(9, 2, 2, 16, torch.bfloat16)
    scale = torch.tensor([0.01, 0.02], device=DEVICE) if pages == FP8 else None
    scales: dict[str, Any] = {"k_scale": scale, "v_scale": scale}
    fused, apart = pages_like(2, 16, pages), pages_like(2, 16, pages)
    q = store_qkv(mixed, cos, sin, positions, *fused, slots, impl="triton", **scales)
    want, k, v = split_qkv(mixed, 2, 16)
    want, k = (rotary(x, cos, sin, positions, impl="triton") for x in (want, k))
    write_kv(k, v, *apart, slots, impl="triton", **scales)
    assert torch.equal(q, want)
    for ours, theirs in zip(fused, apart, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_bad_arguments_are_named() -> None:
    mixed, cos, sin, positions, slots = case(4, 2, 1, 8, torch.float32)
    pages = pages_like(2, 8, torch.float32)
    with pytest.raises(ValueError, match="mixed"):
        store_qkv(mixed[:, :-8], cos, sin, positions, *pages, slots)
    with pytest.raises(ValueError, match="both or neither"):
        store_qkv(mixed, cos, sin, positions, *pages, slots, q_norm=cos[0])
    with pytest.raises(ValueError, match="positions"):
        store_qkv(mixed, cos, sin, positions.int(), *pages, slots)
