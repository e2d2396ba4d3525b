"""Attention over a packed stream in which every suffix sees its row's prefix and itself only.

Shape legend: T tokens of the stream, H query heads, G key/value heads (H a multiple of G), D head dim,
R rows. A row is one prefix followed by its suffixes; rows follow one another without padding.

For a query at stream index i and a key at j of the same row:
    visible(i, j) = j <= i  and  (segment(j) == segment(i)  or  segment(j) is the row's prefix)
    out_i = sum_j softmax_j(scale * q_i . k_j) v_j     over visible j
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sip_engine.kernels._impl import resolve_impl
from sip_engine.kernels._shared_prefix_cost import AttentionCost, attention_cost
from sip_engine.kernels._shared_prefix_flash import shared_prefix_attention_flash
from sip_engine.kernels._shared_prefix_layout import RowLayout, rows_of
from sip_engine.kernels._shared_prefix_split import shared_prefix_attention_split
from sip_engine.kernels._shared_prefix_triton import compile_cases, shared_prefix_attention_triton

__all__ = [
    "AttentionCost",
    "RowLayout",
    "attention_cost",
    "compile_cases",
    "rows_of",
    "shared_prefix_attention",
    "shared_prefix_attention_reference",
]


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


MAX_HEAD_DIM = 128
"""The widest head of impl="triton"."""

IMPLS = {
    "reference": shared_prefix_attention_reference,
    "split": shared_prefix_attention_split,
    "triton": shared_prefix_attention_triton,
    "flash": shared_prefix_attention_flash,
}


def shared_prefix_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    layout: RowLayout,
    *,
    scale: float,
    impl: str | None = None,
) -> Tensor:
    """Attention of a packed stream, differentiable; returns [T, H, D] in the inputs' dtype.

    Args:
        q_THD, k_TGD, v_TGD: of one dtype and device. "triton" copies q unless it is contiguous; k and v
            may be views with a last stride of 1.
        layout: its tables are built when first needed and serve every later call.
        impl: "reference", in any floating dtype; "split", likewise, on a CPU, without padding and masked blocks;
            "triton", in 16 or 32 bits and head dims up to 128, with deterministic gradients; "flash", flash-attn
            2.7 or 2.8 where it is installed, in 16 bits. By default "triton" on CUDA, "split" elsewhere.

    Raises:
        ValueError: the stream's length is not the layout's, the heads do not divide, or `impl` is unknown or
            cannot run on these tensors.
    """
    if q_THD.shape[0] != layout.num_tokens:
        raise ValueError(f"stream of {q_THD.shape[0]} tokens, but the layout's rows hold {layout.num_tokens}")
    same = k_TGD.shape == v_TGD.shape and k_TGD.shape[::2] == q_THD.shape[::2]
    if q_THD.ndim != 3 or not same or q_THD.shape[1] % k_TGD.shape[1]:
        raise ValueError(
            f"q {list(q_THD.shape)}, k {list(k_TGD.shape)} and v {list(v_TGD.shape)} must be [T, H, D], "
            "[T, G, D] and [T, G, D], with H a multiple of G"
        )
    if not q_THD.dtype == k_TGD.dtype == v_TGD.dtype:
        raise ValueError(f"q is {q_THD.dtype}, k {k_TGD.dtype} and v {v_TGD.dtype}: give them one dtype")
    if impl is None and not q_THD.is_cuda:
        impl = "split"
    return IMPLS[resolve_impl(impl, q_THD, tuple(IMPLS))](q_THD, k_TGD, v_TGD, layout, scale)
