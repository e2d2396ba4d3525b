"""Attention of one new token of each rollout over its group's shared prefix and its own suffix.

Shapes: B sequences (rollouts) sorted by group, Gr groups, Hq query heads, H_kv KV heads, R = Hq / H_kv,
D head dim, MBp and MBs table widths in pages. With K = [K_prefix(group of b); K_suffix(b)], V alike:

    o_b = softmax(scale * q_b K^T) V        (zero when both are empty)

A group's rollouts * R query rows are the M dimension of one tile, so its prefix is read once. Two launches:
(group tile, KV head, split) programs write each row's partial output and log-sum-exp over one split of the
prefix; (sequence, KV head) programs join them and go on over the suffix. Splits have a fixed length, and
grids follow from shapes alone: results do not depend on the batch, and the launch can be captured in a graph.
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
from sip_engine.kernels._tiles import Tile, tile_of, tiles_of
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


def decode_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    group_starts: Tensor,
    prefix_tables: Tensor,
    prefix_lens: Tensor,
    suffix_tables: Tensor,
    suffix_lens: Tensor,
    *,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The definition, in plain torch: one group at a time, its prefix read once. See `decode_attention`."""
    dtype = accumulation_dtype(q.dtype)
    scale = softmax_scale(scale, q.shape[-1])
    out = torch.zeros_like(q)
    lens_p, lens_s = prefix_lens.tolist(), suffix_lens.tolist()
    for g, (first, last) in enumerate(pairwise(group_starts.tolist())):
        len_p, len_s = lens_p[g], max(lens_s[first:last], default=0)
        if first == last or len_p + len_s == 0:
            continue
        hidden = torch.arange(len_s, device=q.device) >= suffix_lens[first:last, None]  # [n, s]
        k_p = gather_pages(k_pages, prefix_tables[g], len_p, k_scale, dtype)
        v_p = gather_pages(v_pages, prefix_tables[g], len_p, v_scale, dtype)
        k_s = gather_pages(k_pages, suffix_tables[first:last], len_s, k_scale, dtype)
        v_s = gather_pages(v_pages, suffix_tables[first:last], len_s, v_scale, dtype)
        queries = q[first:last].to(dtype).unflatten(1, (k_pages.shape[2], -1)) * scale
        logits_p = torch.einsum("nhrd,phd->nhrp", queries, k_p)
        logits_s = torch.einsum("nhrd,nshd->nhrs", queries, k_s)
        logits_s.masked_fill_(hidden[:, None, None], float("-inf"))
        v_s.masked_fill_(hidden[:, :, None, None], 0.0)
        weights = torch.cat((logits_p, logits_s), -1).softmax(-1)
        rows = torch.einsum("nhrp,phd->nhrd", weights[..., :len_p], v_p)
        rows += torch.einsum("nhrs,nshd->nhrd", weights[..., len_p:], v_s)
        rows.masked_fill_((suffix_lens[first:last] + len_p == 0)[:, None, None, None], 0.0)
        out[first:last] = rows.flatten(1, 2).to(q.dtype)
    return out


SPLIT = 512
"""Prefix tokens of one program: fixed, so that the sums of a row never depend on the rest of the batch."""


@jit(do_not_specialize=["num_groups", "num_seqs", "stride_table"])
def _prefix_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, group_starts_ptr, tables_ptr, lens_ptr, k_scale_ptr,
    num_groups, num_seqs, stride_qb, stride_qh, stride_table, scale,
    H_KV: tl.constexpr, R: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split of one group's prefix for one tile of its (sequence, head of the KV head) rows."""
    head = tl.program_id(0) % H_KV
    slot = tl.program_id(0) // H_KV
    split = tl.program_id(1)
    if GROUPED:
        group, first, rows, tile_row = find_tile(group_starts_ptr, num_groups, slot, R, BLOCK_M)
        if tile_row >= rows:
            return
    else:  # every sequence is a group
        group = slot // tl.cdiv(R, BLOCK_M)
        first, rows, tile_row = group, R, slot % tl.cdiv(R, BLOCK_M) * BLOCK_M
    row, seq, query_head = tile_rows(first, tile_row, head, R, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    first_part = split.to(tl.int64) * num_seqs

    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, tl.load(lens_ptr + group))
    if begin >= end:
        part_row = (first_part + seq) * (H_KV * R) + query_head
        tl.store(lse_ptr + part_row, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=row < rows)
        return
    live = (row < rows)[:, None] & (d < D)[None, :]
    q_row = seq * stride_qb + query_head * stride_qh
    q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=live, other=0.0)
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr + head)
    acc, m, z = attend_pages(
        q, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32), k_ptr + head * D, v_ptr + head * D,
        tables_ptr + group.to(tl.int64) * stride_table, begin, end, tl.full([BLOCK_M], end, tl.int32), scale,
        True, H_KV, D, PAGE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if GROUPED:
        first, tile_row = tile_origin(group_starts_ptr, group, slot, R, BLOCK_M)
    row, seq, query_head = tile_rows(first, tile_row, head, R, BLOCK_M)
    live = (row < rows)[:, None] & (d < D)[None, :]
    part_row = (first_part + seq) * (H_KV * R) + query_head
    tl.store(part_ptr + part_row[:, None] * D + d[None, :], acc / z[:, None], mask=live)
    tl.store(lse_ptr + part_row, m + tl.log2(z), mask=row < rows)


@jit(do_not_specialize=["num_splits", "num_seqs", "stride_table"])
def _suffix_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, lse_ptr, tables_ptr, lens_ptr, k_scale_ptr, v_scale_ptr,
    num_splits, num_seqs, stride_qb, stride_qh, stride_table, scale,
    H_KV: tl.constexpr, R: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One sequence and tile of one KV head's rows: join the prefix partials (o_s, lse_s), then go on over
    the suffix.

    m = max lse_s; z = sum 2^(lse_s - m); acc = sum 2^(lse_s - m) o_s; acc / z after the suffix.
    """
    head = tl.program_id(0) % H_KV
    seq = (tl.program_id(0) // H_KV).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query_head = head * R + row
    live = (row < R)[:, None] & (d < D)[None, :]
    q_row = seq * stride_qb + query_head * stride_qh
    q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=live, other=0.0)
    end = tl.load(lens_ptr + seq)
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr + head)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    for split in range(0, num_splits):
        part_row = (split * num_seqs + seq) * (H_KV * R) + query_head
        lse = tl.load(lse_ptr + part_row, mask=row < R, other=float("-inf"))
        part = tl.load(part_ptr + part_row[:, None] * D + d[None, :], mask=live, other=0.0)
        part = tl.where((lse > float("-inf"))[:, None], part, 0.0)  # never written past the prefix's end
        m_new = tl.maximum(m, lse)
        base = tl.where(m_new > float("-inf"), m_new, 0.0)
        rescale, weight = tl.exp2(m - base), tl.exp2(lse - base)
        acc = acc * rescale[:, None] + part * weight[:, None]
        z = z * rescale + weight
        m = m_new

    acc, m, z = attend_pages(
        q, acc, m, z, k_ptr + head * D, v_ptr + head * D, tables_ptr + seq * stride_table,
        0, end, tl.full([BLOCK_M], end, tl.int32), scale, True, H_KV, D, PAGE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out = acc / tl.where(z > 0.0, z, 1.0)[:, None]
    if v_scale_ptr is not None:
        out *= tl.load(v_scale_ptr + head)
    offsets = (seq * (H_KV * R) + query_head)[:, None] * D + d[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=live)


def _prefix_tile(dtype: torch.dtype, block_d: int, num_rows: int) -> Tile:
    """The tile for a usual group of `num_rows` query rows: the smallest that holds them, or the largest."""
    rows = {
        up_to: tile
        for (dim, up_to), tile in tiles_of("decode_prefix", dtype.itemsize).items()
        if dim == block_d
    }
    return rows[min((up_to for up_to in rows if up_to >= num_rows), default=max(rows))]


def _attend_prefixes(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    group_starts: Tensor,
    tables: Tensor,
    lens: Tensor,
    scale: float,
    k_scale: Tensor | None,
    group_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Partial outputs [splits, B, Hq, D] and base-2 log-sum-exps [splits, B, Hq] over the prefixes, float32.

    Without `group_size` every sequence is a group and `group_starts` is not read.
    """
    (num_seqs, num_heads, head_dim), (page_size, num_kv_heads) = q.shape, k_pages.shape[1:3]
    ratio, block_d = num_heads // num_kv_heads, padded_head_dim(head_dim, q.dtype)
    num_splits = -(-tables.shape[1] * page_size // SPLIT)
    part = torch.empty((num_splits, num_seqs, num_heads, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((num_splits, num_seqs, num_heads), dtype=torch.float32, device=q.device)
    if num_splits == 0:
        return part, lse
    tile = _prefix_tile(q.dtype, block_d, (group_size or 1) * ratio)
    if group_size is None:
        slots = num_seqs * -(-ratio // tile.block_m)
    else:
        slots = num_tiles(tables.shape[0], num_seqs, ratio, tile.block_m)
    _prefix_kernel[(slots * num_kv_heads, num_splits)](
        q, k_pages, v_pages, part, lse, group_starts, tables, lens, k_scale,
        tables.shape[0], num_seqs, q.stride(0), q.stride(1), tables.stride(0), scale * LOG2_E,
        num_kv_heads, ratio, head_dim, page_size, SPLIT, group_size is not None,
        tile.block_m, tile.block_n, block_d, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return part, lse


def _attend_suffixes(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    part: Tensor,
    lse: Tensor,
    tables: Tensor,
    lens: Tensor,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """Join the prefix partials with the suffixes; returns the output [B, Hq, D]."""
    (num_seqs, num_heads, head_dim), (page_size, num_kv_heads) = q.shape, k_pages.shape[1:3]
    ratio, block_d = num_heads // num_kv_heads, padded_head_dim(head_dim, q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile = tile_of("decode_suffix", q.element_size(), block_d)
    _suffix_kernel[(num_seqs * num_kv_heads, -(-ratio // tile.block_m))](
        q, k_pages, v_pages, out, part, lse, tables, lens, k_scale, v_scale,
        part.shape[0], num_seqs, q.stride(0), q.stride(1), tables.stride(0), scale * LOG2_E,
        num_kv_heads, ratio, head_dim, page_size, tile.block_m, tile.block_n, block_d,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    group_starts: Tensor,
    prefix_tables: Tensor,
    prefix_lens: Tensor,
    suffix_tables: Tensor,
    suffix_lens: Tensor,
    *,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    group_size: int = 16,
    impl: str | None = None,
) -> Tensor:
    """Attend `q` [B, Hq, D], one query a sequence, to prefix and suffix pages; returns [B, Hq, D].

    `group_starts` [Gr + 1] int32 bounds the sequences of each group; `prefix_tables` [Gr, MBp] and
    `suffix_tables` [B, MBs] int32 list page numbers, -1 pads; `prefix_lens` [Gr] and `suffix_lens` [B]
    int32 count tokens, 0 allowed. `scale` is D**-0.5 unless given; `k_scale`, `v_scale` [H_kv] float32 go
    with float8_e4m3fn pages. `group_size` is the usual number of rollouts a group: it selects the tile
    of the triton kernel, so a result depends on it by rounding alone, and on the rest of the batch not at all.
    Lengths and page numbers are the caller's promise: to check them would wait for the device.
    `impl`: "reference", "triton" or "triton_ungrouped" (every sequence reads its prefix alone); by
    default triton on CUDA. ValueError when shapes or dtypes disagree.
    """
    check_pages(k_pages, v_pages, k_scale, v_scale)
    check_queries(q, k_pages)
    num_seqs, num_groups = q.shape[0], prefix_tables.shape[0]
    check_shapes(
        group_starts=(group_starts, (num_groups + 1,)),
        prefix_lens=(prefix_lens, (num_groups,)),
        suffix_tables=(suffix_tables, (num_seqs, suffix_tables.shape[-1])),
        suffix_lens=(suffix_lens, (num_seqs,)),
    )
    check_integers(torch.int32, group_starts=group_starts, prefix_tables=prefix_tables)
    check_integers(torch.int32, prefix_lens=prefix_lens)
    check_integers(torch.int32, suffix_tables=suffix_tables, suffix_lens=suffix_lens)
    impl = resolve_impl(impl, q, ("reference", "triton", "triton_ungrouped"))
    scale = softmax_scale(scale, q.shape[-1])
    prefixes, suffixes = (prefix_tables, prefix_lens), (suffix_tables, suffix_lens)
    if impl == "reference":
        batch = (q, k_pages, v_pages, group_starts, *prefixes, *suffixes)
        return decode_attention_reference(*batch, scale=scale, k_scale=k_scale, v_scale=v_scale)
    if num_seqs == 0:
        return torch.empty_like(q)
    if impl == "triton_ungrouped":
        resolve_impl("triton", q)  # raises where Triton cannot run
        seqs = torch.arange(num_seqs, dtype=group_starts.dtype, device=q.device)
        group_of = torch.searchsorted(group_starts, seqs, right=True) - 1
        prefixes = (prefix_tables[group_of], prefix_lens[group_of])
    usual_size = group_size if impl == "triton" else None
    part, lse = _attend_prefixes(q, k_pages, v_pages, group_starts, *prefixes, scale, k_scale, usual_size)
    return _attend_suffixes(q, k_pages, v_pages, part, lse, *suffixes, scale, k_scale, v_scale)


def compile_cases() -> list[CompileCase]:
    """Every tuned tile, those for 16-bit queries over bfloat16 and over float8 pages."""
    grouped, alone = ({"SPLIT": SPLIT, "GROUPED": value} for value in (True, False))
    cases = []
    for pages in (torch.bfloat16, FP8, torch.float32):
        size = 4 if pages == torch.float32 else 2
        for (dim, _), tile in tiles_of("decode_prefix", size).items():
            cases.append(page_case("decode prefix", _prefix_kernel, tile, pages, dim, grouped))
        for (dim, _), tile in tiles_of("decode_suffix", size).items():
            cases.append(page_case("decode suffix", _suffix_kernel, tile, pages, dim, {}))
    tile = _prefix_tile(torch.bfloat16, 128, 16)
    cases.append(page_case("decode ungrouped", _prefix_kernel, tile, torch.bfloat16, 128, alone))
    return cases
