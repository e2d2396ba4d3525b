"""Model operations of texts of real lengths: what is computed again for memory's sake does not count.

`work` has the same counts for the mean lengths of a plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from sip_engine.accounting.shape import Shape, causal_pairs
from sip_engine.accounting.work import attention_flops, body_flops, head_flops


def generation_flops(shape: Shape, prefix: int, suffixes: Sequence[int]) -> float:
    """A prefix of so many tokens read once, and suffixes of so many decoded from it, the first token of each free."""
    steps = [max(length - 1, 0) for length in suffixes]
    seen = causal_pairs(prefix) + sum(n * prefix + causal_pairs(n) for n in steps)
    return (
        body_flops(shape, prefix + sum(steps))
        + attention_flops(shape, seen)
        + head_flops(shape, sum(suffixes))
    )


def training_flops(
    shape: Shape, prefix: int, suffixes: Sequence[int], targets: int, *, reference: bool
) -> float:
    """Forward and backward of one packed row of which `targets` tokens are scored; with the reference's forward."""
    body = body_flops(shape, prefix + sum(suffixes))
    attention = attention_flops(
        shape, causal_pairs(prefix) + sum(n * prefix + causal_pairs(n) for n in suffixes)
    )
    head = head_flops(shape, targets)
    update = 3 * body + 3.5 * attention + 4 * head
    return update + (body + attention + head if reference else 0.0)
