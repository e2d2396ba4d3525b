"""The inner part of every attention kernel over pages: which tile a program has, and the loop over keys."""

from __future__ import annotations

from typing import Any

import torch

from sip_engine.kernels._tiles import Tile
from sip_engine.kernels._triton import jit, tl
from sip_engine.kernels.compile_report import CompileCase
from sip_engine.kernels.kv_layout import FP8

LOG2_E = 1.4426950408889634


def padded_head_dim(head_dim: int, dtype: torch.dtype) -> int:
    """The power of two from 64 to 256 that holds `head_dim`; ValueError where no Triton kernel exists."""
    if not 0 < head_dim <= 256 or dtype.itemsize not in (2, 4):
        raise ValueError(
            f"no Triton kernel for head dim {head_dim} in {dtype}: use at most 256 in bfloat16, float16 or "
            "float32, or impl='reference'"
        )
    return max(64, 1 << (head_dim - 1).bit_length())


def num_tiles(num_spans: int, num_tokens: int, ratio: int, block_m: int) -> int:
    """Slots that `find_tile` may fill, known from shapes alone: at most `num_spans` of them stay empty."""
    return num_tokens * ratio // block_m + num_spans


@jit
def tile_origin(starts_ptr, span, slot, R: tl.constexpr, BLOCK_M: tl.constexpr):
    """First token of the span, and the first row of the tile that `slot` stands for: see `find_tile`.

    The load is volatile, so that a second call after the loop over keys computes the addresses of the rows
    again. Kept alive through the loop they take tens of registers a thread, and the widest tiles spill.
    """
    first = tl.load(starts_ptr + span, volatile=True)
    return first, (slot - first * R // BLOCK_M - span) * BLOCK_M


@jit
def find_tile(starts_ptr, num_spans, slot, R: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which span of `starts` [num_spans + 1], and which tile of its (token, head) rows, belongs to `slot`?

    Span i owns the slots from starts[i] * R // BLOCK_M + i on. As floor(a + b) + 1 >= floor(a) + ceil(b),
    these are never fewer than the ceil(rows / BLOCK_M) it needs; spare slots get a first row >= rows.
    Returns (span, its first token, its rows, first row of the tile).
    """
    num_begun = 0
    for base in range(0, num_spans, 1024):
        i = base + tl.arange(0, 1024)
        start = tl.load(starts_ptr + i, mask=i < num_spans, other=0)
        begun = (start * R // BLOCK_M + i <= slot) & (i < num_spans)
        num_begun += tl.sum(begun.to(tl.int32))
    span = num_begun - 1
    first, tile_row = tile_origin(starts_ptr, span, slot, R, BLOCK_M)
    return span, first, (tl.load(starts_ptr + span + 1) - first) * R, tile_row


@jit
def tile_rows(first, tile_row, head, R: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row within the span, token and query head of each row of a tile: [BLOCK_M] each."""
    row = tile_row + tl.arange(0, BLOCK_M)
    return row, (first + row // R).to(tl.int64), head * R + row % R


@jit
def attend_pages(
    q, acc, m, z, k_ptr, v_ptr, table_ptr, begin, end, visible, scale,
    MASKED: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax of the rows `q` [M, D] over the keys [begin, end) of one table and one KV head.

        s = scale * q k^T       m' = max(m, max s)      a = 2^(m - m')      p = 2^(s - m')
        z' = a z + sum p        acc' = a acc + p v

    `scale` includes log2(e). Row r sees the keys n < visible[r]; without MASKED it sees them all, and their
    number must be a multiple of BLOCK_N. Returns (acc [M, D], m [M], z [M]), float32; the output is acc / z.
    """
    if k_ptr.dtype.element_ty == tl.float8e4nv and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)  # float8 pages convert to float16 exactly, five times faster than to bfloat16
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        page = tl.load(table_ptr + n // PAGE, mask=n < end, other=0).to(tl.int64)
        offsets = (page * PAGE + n % PAGE)[:, None] * (H_KV * D) + d[None, :]
        live = (d < D)[None, :]
        if MASKED:
            live &= (n < end)[:, None]
        k = tl.load(k_ptr + offsets, mask=live, other=0.0).to(q.dtype)
        s = tl.dot(q, k.T, input_precision="tf32x3") * scale
        if MASKED:
            s = tl.where(n[None, :] < visible[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        rescale = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        v = tl.load(v_ptr + offsets, mask=live, other=0.0).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * rescale[:, None], input_precision="tf32x3")
        z = z * rescale + tl.sum(p, 1)
        m = m_new
    return acc, m, z


def page_case(
    name: str,
    kernel: Any,
    tile: Tile,
    pages: torch.dtype,
    head_dim: int,
    constexprs: dict[str, Any],
) -> CompileCase:
    """The compile case of an attention kernel: pages of 32, and 8 KV heads of 3 query heads, since a ratio
    that is no power of two takes the most registers.

    Queries are bfloat16, or float32 over float32 pages; float8 pages get scale pointers, others None.
    """
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", FP8: "fp8e4nv"}
    query = torch.float32 if pages == torch.float32 else torch.bfloat16
    pointers = {"q_ptr": names[query], "out_ptr": names[query], "k_ptr": names[pages], "v_ptr": names[pages]}
    pointers |= dict.fromkeys(("part_ptr", "lse_ptr", "k_scale_ptr", "v_scale_ptr"), "fp32")
    constexprs = constexprs | {"H_KV": 8, "R": 3, "D": head_dim, "PAGE": 32}
    constexprs |= {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": padded_head_dim(head_dim, query),
    }
    signature = {}
    for argument in kernel.arg_names:
        if argument.endswith("scale_ptr") and pages != FP8:
            constexprs[argument] = None
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{pointers.get(argument, 'i32')}:16"
        elif argument not in constexprs:
            integer = "i32:16" if argument.startswith("stride_q") else "i32"
            signature[argument] = "fp32" if argument == "scale" else integer
    wgmma = query == torch.bfloat16 and tile.block_m >= 64
    return CompileCase(
        f"{name} {names[pages]} pages D={head_dim} rows={tile.block_m}",
        kernel, signature, constexprs, tile.num_warps, tile.num_stages, wgmma,
    )  # fmt: skip
