"""What attention over a packed stream costs, in tokens and operations, with its prefixes shared or not."""

from __future__ import annotations

from dataclasses import dataclass

from sip_engine.kernels._shared_prefix_layout import RowLayout


@dataclass(frozen=True)
class AttentionCost:
    """Counts of one attention layer over one micro-batch."""

    tokens: int
    """Tokens through the network."""
    pairs: int
    """Visible (query, key) pairs of one head."""
    forward_flops: int
    """Two products of 2 D operations a pair and head: q k^T and p v."""
    backward_flops: int
    """Five: q k^T again, dp = do v^T, dv = p^T do, dq = ds k, dk = ds^T q. A kernel that computes dq apart
    from dk and dv runs seven."""


def attention_cost(layout: RowLayout, *, num_heads: int, head_dim: int, shared: bool = True) -> AttentionCost:
    """The cost of `layout`, or unless `shared` of its suffixes as sequences of their own, each with its prefix.

    A row without suffixes is one sequence either way. Masked pairs are not counted: this is the work that the
    definition asks for, not what a tiled kernel executes.
    """
    tokens = pairs = 0
    for prefix, suffixes in zip(layout.prefix_lens, layout.suffix_lens, strict=True):
        times = 1 if shared else max(1, len(suffixes))
        tokens += times * prefix + sum(suffixes)
        pairs += times * prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in suffixes)
    product = 2 * head_dim * num_heads * pairs
    return AttentionCost(tokens, pairs, 2 * product, 5 * product)
