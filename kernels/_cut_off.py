"""Which columns top-k and top-p keep of a row of logits, with and without sorting it.

B: rows, V: columns, T: temperature. Of equal logits the lowest columns stay. The mass of a column is a whole number,

    w = floor(2^s exp(l / T - max l / T))        with 2^s V <= 2^62

so that every order of summing masses gives the same total, and every implementation below the same columns:

    reference     sorts each row: the definition
    candidates    looks at the largest few, and at more where these do not reach (asks the host: for the CPU)
    triton        searches, two bits at a time, for the logit at which the count or the mass is reached
"""

from __future__ import annotations

import torch
from torch import Tensor

from sip_engine.kernels._impl import resolve_impl
from sip_engine.kernels._triton import jit, tl
from sip_engine.kernels.compile_report import CompileCase

CANDIDATES = 256
"""Largest logits that the CPU looks at first."""
BLOCK_V, NUM_WARPS = 1024, 8


def masses(logits: Tensor, largest: Tensor, temperature: float, num_columns: int) -> Tensor:
    """int64, of logits [B, n]; `largest` [B, 1] is the row's, `num_columns` is V. 0 where they are not finite."""
    bits = 62 - (num_columns - 1).bit_length()
    if temperature != 1:
        logits, largest = logits / temperature, largest / temperature
    scaled = logits.double().sub_(largest).exp_().mul_(2.0**bits)
    # What NaN becomes is not the same everywhere, but its row is void.
    return scaled.to(torch.int64).clamp_(min=0)


def mass_limit(total: Tensor, top_p: float) -> Tensor:
    """int64: a column stays while the mass before it is below this; at least 1, so that one always stays."""
    return (total.double() * top_p).ceil_().to(torch.int64).clamp_(min=1)


def keep_mask_reference(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The definition, in plain torch. See `keep_mask`."""
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    kept = torch.ones_like(ordered[:, :top_k], dtype=torch.bool)
    if top_p < 1:
        mass = masses(ordered[:, :top_k], ordered[:, :1], temperature, logits.shape[1])
        kept = mass.cumsum(1) - mass < mass_limit(mass.sum(1), top_p)[:, None]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order[:, :top_k], kept)


def _keep_mask_candidates(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    num_columns = logits.shape[1]
    number, total = top_k, None
    if top_p < 1 and top_k == num_columns:
        total = masses(logits, logits.amax(1, keepdim=True), temperature, num_columns).sum(1)
        number = min(CANDIDATES, num_columns)
    while True:
        best = logits.topk(number, dim=1).values  # falling
        if top_p == 1:
            kept = torch.ones_like(best, dtype=torch.bool)
            break
        mass = masses(best, best[:, :1], temperature, num_columns)
        limit = mass_limit(mass.sum(1) if total is None else total, top_p)[:, None]
        kept = mass.cumsum(1) - mass < limit  # true, then false
        if total is None or number == num_columns or bool((mass.sum(1, keepdim=True) >= limit).all()):
            break
        number = min(8 * number, num_columns)
    level = best.gather(1, kept.sum(1, keepdim=True) - 1)
    num_ties = (kept & (best == level)).sum(1, keepdim=True)
    above, ties = logits > level, logits == level
    if bool((ties.sum(1, keepdim=True) > num_ties).any()):
        ties &= ties.cumsum(1) <= num_ties
    return above | ties


@jit
def order_of(logits):
    """Whole numbers from 0 to 2^32 - 1 in the order of the logits, -0 as 0."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@jit
def find_level(logits_ptr, masses_ptr, num_columns, limit, WEIGHTED: tl.constexpr, BLOCK_V: tl.constexpr):
    """The largest t whose columns at t or above count, or weigh, at least `limit`; and what those above t do."""
    level = tl.full([], 0, tl.int64)
    above = tl.full([], 0, tl.int64)
    for step in range(0, 16):
        unit = tl.full([], 1, tl.int64) << (30 - 2 * step)
        one = tl.full([], 0, tl.int64)
        two = tl.full([], 0, tl.int64)
        three = tl.full([], 0, tl.int64)
        for start in range(0, num_columns, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            live = column < num_columns
            order = order_of(tl.load(logits_ptr + column, mask=live, other=0.0))
            weight = tl.load(masses_ptr + column, mask=live, other=0) if WEIGHTED else live.to(tl.int64)
            one += tl.sum(tl.where(live & (order >= level + unit), weight, 0))
            two += tl.sum(tl.where(live & (order >= level + 2 * unit), weight, 0))
            three += tl.sum(tl.where(live & (order >= level + 3 * unit), weight, 0))
        reached = (one >= limit).to(tl.int64) + (two >= limit).to(tl.int64) + (three >= limit).to(tl.int64)
        # The last that does not reach the limit is all there is above, once the search ends.
        above = tl.where(reached == 0, one, tl.where(reached == 1, two, tl.where(reached == 2, three, above)))
        level += reached * unit
    return level, above


@jit(do_not_specialize=["num_columns", "top_k", "stride"])
def cut_off_kernel(
    logits_ptr, masses_ptr, keep_ptr, top_p_ptr, stride, num_columns, top_k,
    HAS_K: tl.constexpr, HAS_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program a row, which it reads 16 times a search, from the cache after the first."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    masses_ptr += row * num_columns
    level = tl.full([], 0, tl.int64)
    num_ties = tl.full([], 1, tl.int64) << 40
    if HAS_K:
        level, above = find_level(logits_ptr, masses_ptr, num_columns, top_k, False, BLOCK_V)
        num_ties = top_k - above
    if HAS_P:
        total = tl.full([], 0, tl.int64)
        for start in range(0, num_columns, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            live = column < num_columns
            order = order_of(tl.load(logits_ptr + column, mask=live, other=0.0))
            mass = tl.load(masses_ptr + column, mask=live, other=0)
            total += tl.sum(tl.where(live & (order > level), mass, 0))
            if HAS_K:  # and of those at the level as many as there is room for
                ties = (live & (order == level)).to(tl.int64)
                total += tl.sum(tl.where((ties > 0) & (tl.cumsum(ties, 0) <= num_ties), mass, 0))
                num_ties -= tl.minimum(num_ties, tl.sum(ties))
            else:
                total += tl.sum(tl.where(live & (order == level), mass, 0))
        if HAS_K:
            num_ties = top_k - above
        limit = tl.maximum(tl.ceil(total.to(tl.float64) * tl.load(top_p_ptr)).to(tl.int64), 1)
        mass_level, mass_above = find_level(logits_ptr, masses_ptr, num_columns, limit, True, BLOCK_V)
        at_level = tl.full([], 0, tl.int64)
        for start in range(0, num_columns, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            live = column < num_columns
            order = order_of(tl.load(logits_ptr + column, mask=live, other=0.0))
            mass = tl.load(masses_ptr + column, mask=live, other=0)
            at_level = tl.maximum(at_level, tl.max(tl.where(live & (order == mass_level), mass, 0)))
        at_level = tl.maximum(at_level, 1)
        mass_ties = (limit - mass_above + at_level - 1) // at_level
        num_ties = tl.where(mass_level > level, mass_ties, tl.minimum(mass_ties, num_ties))
        level = tl.maximum(level, mass_level)
    for start in range(0, num_columns, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        live = column < num_columns
        order = order_of(tl.load(logits_ptr + column, mask=live, other=0.0))
        ties = (live & (order == level)).to(tl.int64)
        kept = (order > level) | ((ties > 0) & (tl.cumsum(ties, 0) <= num_ties))
        num_ties -= tl.minimum(num_ties, tl.sum(ties))
        tl.store(keep_ptr + row * num_columns + column, kept.to(tl.int8), mask=live)


def _keep_mask_triton(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    num_rows, num_columns = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    keep = torch.empty((num_rows, num_columns), dtype=torch.int8, device=logits.device)
    has_p = top_p < 1
    weight = masses(logits, logits.amax(1, keepdim=True), temperature, num_columns) if has_p else keep
    # Through memory, since a Python float reaches a kernel in 32 bits.
    share = torch.full((1,), top_p, dtype=torch.float64, device=logits.device)
    cut_off_kernel[(num_rows,)](
        logits, weight, keep, share, logits.stride(0), num_columns, top_k, top_k < num_columns, has_p, BLOCK_V,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return keep.view(torch.bool)


def keep_mask(
    logits: Tensor, temperature: float, top_k: int, top_p: float, *, impl: str | None = None
) -> Tensor:
    """True [B, V] for the columns that top-k, then top-p, leave of `logits` float32 [B, V].

    top_k: at least 1; top_p: in (0, 1]; temperature: above 0. `impl`: "reference", "candidates" or "triton", which
    all give the same columns; by default triton on CUDA, candidates elsewhere. ValueError where it cannot run.
    """
    if impl is None and not logits.is_cuda:
        impl = "candidates"
    impl = resolve_impl(impl, logits, tuple(IMPLS))
    if logits.numel() == 0:
        return torch.zeros_like(logits, dtype=torch.bool)
    return IMPLS[impl](logits, temperature, min(top_k, logits.shape[1]), top_p)


IMPLS = {
    "reference": keep_mask_reference,
    "candidates": _keep_mask_candidates,
    "triton": _keep_mask_triton,
}


def compile_cases() -> list[CompileCase]:
    """The configurations to check for sm_90."""
    signature = {
        "logits_ptr": "*fp32:16",
        "masses_ptr": "*i64:16",
        "keep_ptr": "*i8:16",
        "top_p_ptr": "*fp64:16",
    }
    signature |= dict.fromkeys(("stride", "num_columns", "top_k"), "i32")
    return [
        CompileCase(
            f"cut_off {name}",
            cut_off_kernel,
            signature,
            {"HAS_K": k, "HAS_P": p, "BLOCK_V": BLOCK_V},
            NUM_WARPS,
        )
        for name, k, p in (("top-k", True, False), ("top-p", False, True), ("top-k top-p", True, True))
    ]
