"""Grouped decode attention on the CPU: prefix keys contiguous per group, suffix keys as views of the cache.

The same function as `decode_attention`, for a wave whose groups all have G rollouts. Shape legend: Gr groups,
B = Gr * G sequences, Hq query heads, H_kv KV heads, R = Hq / H_kv, D head dim, P longest prefix, t suffix tokens.
Each part is one call of torch's flash attention for the CPU, which also returns its log-sum-exp:

    out = out_p * w + out_s * (1 - w),   w = sigmoid(lse_p - lse_s)
"""

from __future__ import annotations

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def dense_decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_bias: Tensor | None,
    suffix_k: Tensor,
    suffix_v: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Attend one query a sequence to its group's prefix and its own suffix.

    Args:
        q: [B, Hq, D], sequences sorted by group.
        prefix_k, prefix_v: [Gr, H_kv, P, D], read once for the G * R queries of a group and KV head.
        prefix_bias: [Gr, 1, 1, P], 0 inside a prefix and -inf past its end; None when all are P long.
        suffix_k, suffix_v: [B, t, H_kv, D] with t >= 1, any strides but a contiguous last dim.

    Returns:
        [B, Hq, D] in q's dtype.
    """
    num_groups, num_kv_heads, _, dim = prefix_k.shape
    grouped = q.view(num_groups, -1, num_kv_heads, q.shape[1] // num_kv_heads, dim).transpose(1, 2)
    rows = grouped.flatten(2, 3)  # [Gr, H_kv, G * R, D]
    out_p, lse_p = _flash(rows, prefix_k, prefix_v, 0.0, False, attn_mask=prefix_bias, scale=scale)
    own = q.view(len(q), num_kv_heads, -1, dim)
    out_s, lse_s = _flash(own, suffix_k.transpose(1, 2), suffix_v.transpose(1, 2), 0.0, False, scale=scale)
    by_sequence = out_p.view(grouped.shape).transpose(1, 2).reshape(own.shape)
    lse_by_sequence = lse_p.view(grouped.shape[:-1]).transpose(1, 2).reshape(lse_s.shape)
    weight = torch.sigmoid(lse_by_sequence - lse_s).to(q.dtype)[..., None]
    return torch.lerp(out_s, by_sequence, weight).view(q.shape)
