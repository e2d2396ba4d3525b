"""Rotary position embedding, rotate-half layout (Llama, Megatron's default).

N: tokens, heads: attention heads, D: head size (even), M: rows of the tables. First half x1, second half x2:

    y1 = x1 * cos[p] - x2 * sin[p]
    y2 = x2 * cos[p] + x1 * sin[p]                    (in float32, rounded once)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sip_engine.kernels._impl import Impl, resolve_impl


def rotary_tables(
    max_positions: int, dim: int, base: float, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each float32 [max_positions, dim / 2], of position * base^(-2i / dim).

    The angles are float32 products, as trainers compute them: wider angles would part sampler and trainer.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    positions = torch.arange(max_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / (base**exponents))
    return angles.cos(), angles.sin()


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """The definition, in plain torch. See `rotary`."""
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    out: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Rotate `x` [N, heads, D] by the angles of `positions` [N]."""
    resolve_impl(impl, x, ("reference",))
    y = rotary_reference(x, cos, sin, positions)
    return y if out is None else out.copy_(y)
