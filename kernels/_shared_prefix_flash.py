"""Attention over a packed stream by flash-attn's variable-length kernels, where that package is installed.

Two calls: every segment (prefix or suffix) to itself, causal, over the stream as it is; and all suffix tokens
of a row to its prefix, not causal, over gathered copies. They are joined by their log-sum-exps:

    l = log(e^l1 + e^l2)        o = e^(l1 - l) o1 + e^(l2 - l) o2

The kernels' backward computes p = e^(s - l) and ds = p (do v^T - sum_d do o) from whatever l and o it is
given. Fed the joint ones, each call gives its own share of the joint dq, dk and dv, which are then added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sip_engine.kernels._flash_attn import varlen_backward, varlen_forward, why_not
from sip_engine.kernels._shared_prefix_layout import RowLayout


@dataclass(frozen=True)
class Sequences:
    """How one variable-length call cuts its queries and keys into sequences."""

    cu_queries: Tensor
    """[n + 1] int32."""
    cu_keys: Tensor
    longest_query: int
    longest_key: int
    causal: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output [tokens, Hq, D] and natural log-sum-exps [Hq, tokens] float32."""
        cu, longest = (self.cu_queries, self.cu_keys), (self.longest_query, self.longest_key)
        return varlen_forward(q, k, v, cu, longest, self.causal, scale)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of these sequences, from an output and log-sum-exps that may cover more keys."""
        cu, longest = (self.cu_queries, self.cu_keys), (self.longest_query, self.longest_key)
        return varlen_backward(dout, q, k, v, out, lse, cu, longest, self.causal, scale)


@dataclass(frozen=True)
class Plan:
    """Both calls of one layout. Rows without a prefix, or without suffixes, take no part in the second."""

    own: Sequences
    shared: Sequences | None
    suffix_tokens: Tensor
    """[queries of the second call] int64: where they are in the stream."""
    prefix_tokens: Tensor


def _sequences(query_lens: list[int], key_lens: list[int], causal: bool, device: torch.device) -> Sequences:
    def cumulative(lens: list[int]) -> Tensor:
        return torch.tensor([0, *np.cumsum(lens).tolist()], dtype=torch.int32, device=device)

    # The lengths only bound the grid. At one query per sequence flash-attn would take a decode path of its own.
    longest_query, longest_key = max(2, *query_lens), max(2, *key_lens)
    return Sequences(cumulative(query_lens), cumulative(key_lens), longest_query, longest_key, causal)


def make_plan(layout: RowLayout) -> Plan:
    """The calls' metadata, on the layout's device."""
    own = _sequences(list(layout.segment_lens), list(layout.segment_lens), True, layout.device)
    bounds = zip(layout.row_starts, layout.row_starts[1:], layout.prefix_lens, strict=False)
    shared = [(start, start + n, end) for start, end, n in bounds if 0 < n < end - start]

    def tokens(runs: list[tuple[int, int]]) -> Tensor:
        return torch.cat([torch.arange(0), *(torch.arange(*run) for run in runs)]).to(layout.device)

    query_lens = [end - prefix_end for _, prefix_end, end in shared]
    key_lens = [prefix_end - start for start, prefix_end, _ in shared]
    return Plan(
        own,
        _sequences(query_lens, key_lens, False, layout.device) if shared else None,
        tokens([(prefix_end, end) for _, prefix_end, end in shared]),
        tokens([(start, prefix_end) for start, prefix_end, _ in shared]),
    )


def _join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The output [n, Hq, D] and log-sum-exps [Hq, n] over both sets of keys; sums in float32."""
    joint = torch.logaddexp(lse, other_lse)
    first, second = ((part - joint).exp().T[:, :, None] for part in (lse, other_lse))
    return (out * first + other * second).to(out.dtype), joint


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
        out, lse = plan.own.forward(q, k, v, scale)
        if plan.shared is not None:
            here, there = plan.suffix_tokens, plan.prefix_tokens
            shared = plan.shared.forward(q[here], k[there], v[there], scale)
            out[here], lse[:, here] = _join(out[here], lse[:, here], *shared)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, dout = ctx.plan, dout.contiguous()
        dq, dk, dv = plan.own.backward(dout, q, k, v, out, lse, ctx.scale)
        if plan.shared is not None:
            here, there = plan.suffix_tokens, plan.prefix_tokens
            more = plan.shared.backward(
                dout[here], q[here], k[there], v[there], out[here], lse[:, here].contiguous(), ctx.scale
            )
            for gradient, index, part in zip((dq, dk, dv), (here, there, there), more, strict=True):
                gradient[index] += part  # no index comes twice
        return dq, dk, dv, None, None


def shared_prefix_attention_flash(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, scale: float) -> Tensor:
    """See `shared_prefix_attention`. Raises ValueError where flash-attn is missing or has no kernel."""
    reason = why_not(q.shape[2], q.dtype)
    if reason:
        raise ValueError(f"impl='flash': {reason}")
    if q.numel() == 0:
        return torch.empty_like(q)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    plan = layout.once("flash", lambda: make_plan(layout))
    return _FlashAttention.apply(q, k, v, plan, scale)  # pyright: ignore[reportReturnType]
