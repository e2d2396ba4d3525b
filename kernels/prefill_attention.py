"""Causal attention of many new tokens of each sequence over its paged keys and values.

Shapes: T new tokens of num_seqs sequences, Hq query heads, H_kv KV heads, R = Hq / H_kv, D head dim,
MB table width in pages. Query j of a sequence with q_len new tokens among context_len sits at

    position p = context_len - q_len + j        and        o = softmax(scale * q K[:p + 1]^T) V[:p + 1].

So chunked prefill and prefix reuse need nothing else.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sip_engine.kernels._attend import (
    LOG2_E,
    attend_pages,
    find_tile,
    num_tiles,
    padded_head_dim,
    page_case,
    tile_origin,
    tile_rows,
)
from sip_engine.kernels._impl import resolve_impl
from sip_engine.kernels._tiles import tile_of, tiles_of
from sip_engine.kernels._triton import jit, tl
from sip_engine.kernels.compile_report import CompileCase
from sip_engine.kernels.kv_layout import (
    FP8,
    accumulation_dtype,
    check_integers,
    check_pages,
    check_queries,
    check_shapes,
    gather_pages,
    softmax_scale,
)


def prefill_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The definition, in plain torch: one sequence at a time. See `prefill_attention`."""
    dtype = accumulation_dtype(q.dtype)
    num_kv_heads = k_pages.shape[2]
    scale = softmax_scale(scale, q.shape[-1])
    out = torch.zeros_like(q)
    contexts = context_lens.tolist()
    for i, (first, last) in enumerate(pairwise(cu_seqlens.tolist())):
        context, num_new = contexts[i], last - first
        keys = gather_pages(k_pages, tables[i], context, k_scale, dtype)
        values = gather_pages(v_pages, tables[i], context, v_scale, dtype)
        queries = q[first:last].to(dtype).unflatten(1, (num_kv_heads, -1))
        logits = torch.einsum("thrd,nhd->hrtn", queries, keys) * scale
        future = torch.ones(num_new, context, dtype=torch.bool, device=q.device).triu(context - num_new + 1)
        weights = logits.masked_fill_(future, float("-inf")).softmax(-1)
        out[first:last] = torch.einsum("hrtn,nhd->thrd", weights, values).flatten(1, 2).to(q.dtype)
    return out


@jit(do_not_specialize=["num_seqs", "stride_table"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, tables_ptr, cu_seqlens_ptr, context_lens_ptr, k_scale_ptr, v_scale_ptr,
    num_seqs, stride_qt, stride_qh, stride_table, scale,
    H_KV: tl.constexpr, R: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of (token, head of the KV head) rows: keys all rows see without a mask, then the diagonal."""
    head = tl.program_id(0) % H_KV
    slot = tl.program_id(0) // H_KV
    seq, first, rows, tile_row = find_tile(cu_seqlens_ptr, num_seqs, slot, R, BLOCK_M)
    if tile_row >= rows:
        return
    row, token, query_head = tile_rows(first, tile_row, head, R, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    live = (row < rows)[:, None] & (d < D)[None, :]
    q_row = token * stride_qt + query_head * stride_qh
    q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=live, other=0.0)

    context = tl.load(context_lens_ptr + seq)
    before = context - rows // R + 1  # keys the sequence's first query sees
    visible = before + row // R
    seen_by_all = (before + tile_row // R) // BLOCK_N * BLOCK_N
    seen_by_last = tl.minimum(before + (tile_row + BLOCK_M - 1) // R, context)
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr + head)
    k_ptr += head * D
    v_ptr += head * D
    table_ptr = tables_ptr + seq.to(tl.int64) * stride_table
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    acc, m, z = attend_pages(
        q, acc, m, z, k_ptr, v_ptr, table_ptr, 0, seen_by_all, visible, scale,
        False, H_KV, D, PAGE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, m, z = attend_pages(
        q, acc, m, z, k_ptr, v_ptr, table_ptr, seen_by_all, seen_by_last, visible, scale,
        True, H_KV, D, PAGE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out = acc / z[:, None]
    if v_scale_ptr is not None:
        out *= tl.load(v_scale_ptr + head)
    first, tile_row = tile_origin(cu_seqlens_ptr, seq, slot, R, BLOCK_M)
    row, token, query_head = tile_rows(first, tile_row, head, R, BLOCK_M)
    live = (row < rows)[:, None] & (d < D)[None, :]
    offsets = (token * (H_KV * R) + query_head)[:, None] * D + d[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=live)


def _prefill_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_pages.shape[1:3]
    num_seqs = tables.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    ratio, block_d = num_heads // num_kv_heads, padded_head_dim(head_dim, q.dtype)
    tile = tile_of("prefill", q.element_size(), block_d)
    _prefill_kernel[(num_tiles(num_seqs, num_tokens, ratio, tile.block_m) * num_kv_heads,)](
        q, k_pages, v_pages, out, tables, cu_seqlens, context_lens, k_scale, v_scale,
        num_seqs, q.stride(0), q.stride(1), tables.stride(0), scale * LOG2_E,
        num_kv_heads, ratio, head_dim, page_size, tile.block_m, tile.block_n, block_d,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attend `q` [T, Hq, D] to the pages of each query's sequence up to its own position; returns [T, Hq, D].

    `tables` [num_seqs, MB] int32 lists page numbers, -1 pads; `cu_seqlens` [num_seqs + 1] int32 bounds
    the new tokens; `context_lens` [num_seqs] int32 counts all tokens in the pages, the new ones included.
    `scale` is D**-0.5 unless given; `k_scale`, `v_scale` [H_kv] float32 go with float8_e4m3fn pages.
    Lengths and page numbers are the caller's promise: to check them would wait for the device.
    `impl`: "reference" or "triton"; by default triton on CUDA. ValueError when shapes or dtypes disagree.
    """
    check_pages(k_pages, v_pages, k_scale, v_scale)
    check_queries(q, k_pages)
    num_seqs = tables.shape[0]
    check_shapes(cu_seqlens=(cu_seqlens, (num_seqs + 1,)), context_lens=(context_lens, (num_seqs,)))
    check_integers(torch.int32, tables=tables, cu_seqlens=cu_seqlens, context_lens=context_lens)
    impl = resolve_impl(impl, q, ("reference", "triton"))
    scale = softmax_scale(scale, q.shape[-1])
    batch = (q, k_pages, v_pages, tables, cu_seqlens, context_lens)
    if impl == "reference":
        return prefill_attention_reference(*batch, scale=scale, k_scale=k_scale, v_scale=v_scale)
    return _prefill_triton(*batch, scale, k_scale, v_scale)


def compile_cases() -> list[CompileCase]:
    """Every tuned tile, those for 16-bit queries over bfloat16 and over float8 pages."""
    return [
        page_case("prefill", _prefill_kernel, tile, pages, dim, {})
        for pages in (torch.bfloat16, FP8, torch.float32)
        for (dim, _), tile in tiles_of("prefill", 4 if pages == torch.float32 else 2).items()
    ]
