"""flash-attn's low-level functions in plain torch, for what the engine asks of them: lines 2.8 and 4."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor


def varlen_forward_twin(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
):  # fmt: skip
    """flash_attn 2.8's `_flash_attn_varlen_forward` in plain torch, for what the engine asks of it."""
    assert (window_size_left, window_size_right, softcap, dropout_p) == (-1, -1, 0.0, 0.0)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_q) == len(cu_seqlens_k)
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q), dtype=q.dtype, device=q.device)
    for (first, last), (begin, end) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        assert 0 < last - first <= max_seqlen_q and 0 < end - begin <= max_seqlen_k and max_seqlen_q > 1
        s = scores_twin(q[first:last], k[begin:end], softmax_scale, causal)
        lse[:, first:last] = s.logsumexp(-1)
        values = v[begin:end].repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[first:last] = torch.einsum("hqk,khd->qhd", s.softmax(-1), values)
    return out, lse, torch.empty(0), torch.empty(2)


def scores_twin(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    s = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    assert not causal or len(q) == len(k)
    return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf")) if causal else s


def varlen_backward_twin(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    deterministic, rng_state=None, zero_tensors=False,
):  # fmt: skip
    """`_flash_attn_varlen_backward` likewise: it trusts the log-sum-exps and the output it is given."""
    assert softmax_lse.is_contiguous() and softmax_lse.shape == (q.shape[1], len(q)) and dout.is_contiguous()
    delta = (dout * out).sum(-1).T
    ratio = q.shape[1] // k.shape[1]
    for (first, last), (begin, end) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        i, j = slice(first, last), slice(begin, end)
        keys, values = (x[j].repeat_interleave(ratio, 1) for x in (k, v))
        p = (scores_twin(q[i], k[j], softmax_scale, causal) - softmax_lse[:, i, None]).exp()
        ds = p * (torch.einsum("qhd,khd->hqk", dout[i], values) - delta[:, i, None]) * softmax_scale
        dq[i] = torch.einsum("hqk,khd->qhd", ds, keys)
        dk[j] = torch.einsum("hqk,qhd->khd", ds, q[i]).unflatten(1, (-1, ratio)).sum(2)
        dv[j] = torch.einsum("hqk,qhd->khd", p, dout[i]).unflatten(1, (-1, ratio)).sum(2)
    return delta


def fwd_twin(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, *, return_lse=False,
):  # fmt: skip
    """`flash_attn.cute.interface._flash_attn_fwd` of 4.0.0b36, with its parameters up to the windows."""
    assert return_lse
    assert qv is seqused_q is seqused_k is min_seqlen_k is page_table is softcap is None
    assert window_size_left is window_size_right is None
    out, lse, *_ = varlen_forward_twin(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal
    )
    return out, lse, None, None, None


def bwd_twin(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, cu_seqlens_q=None, cu_seqlens_k=None,
    max_seqlen_q=None, max_seqlen_k=None, deterministic=False,
):  # fmt: skip
    """`_flash_attn_bwd` likewise."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    varlen_backward_twin(
        dout, q, k, v, out, lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0,
        softmax_scale, causal, -1, -1, 0.0, None, deterministic,
    )  # fmt: skip
    return dq, dk, dv


TWINS = {
    2: SimpleNamespace(
        _flash_attn_varlen_forward=varlen_forward_twin, _flash_attn_varlen_backward=varlen_backward_twin
    ),
    4: SimpleNamespace(_flash_attn_fwd=fwd_twin, _flash_attn_bwd=bwd_twin),
}
"""Line -> its module."""
