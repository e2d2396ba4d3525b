"""What a decode step does beside the model: where the new tokens go before it, and moving on after it.

B: rows (sequences), MB: pages of a suffix, T: steps that the history holds. A row of length 0 is empty: it stores
nothing and stays empty, so that one captured step serves any number of sequences up to B.

    slots[b]   = page * page_size + offset of position lens[b] - 1, by its block table; -1 without a page
    advance:     tokens = ids, positions + 1, draw_positions + 1, lens + (lens > 0), counts + 1,
                 history[counts[b] % T, :, b] = (ids[b], bits of logprobs[b])
"""

from __future__ import annotations

import torch
from torch import Tensor

from sip_engine.kernels._impl import Impl, resolve_impl
from sip_engine.kernels._triton import jit, tl, triton
from sip_engine.kernels.compile_report import CompileCase
from sip_engine.kernels.kv_layout import check_integers, check_shapes

BLOCK = 256


def next_slots_reference(tables: Tensor, lens: Tensor, page_size: int) -> Tensor:
    """The definition, in plain torch. See `next_slots`."""
    last = lens.long() - 1
    block = last.div(page_size, rounding_mode="floor")
    inside = (last >= 0) & (block < tables.shape[1])
    page = tables.gather(1, block.masked_fill(~inside, 0)[:, None])[:, 0].long()
    return (page * page_size + last % page_size).masked_fill(~inside | (page < 0), -1)


@jit(do_not_specialize=["num_rows", "stride_table", "num_blocks"])
def _slots_kernel(
    tables_ptr, lens_ptr, slots_ptr, num_rows, stride_table, num_blocks, PAGE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program for BLOCK rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_rows
    last = tl.load(lens_ptr + row, mask=live, other=0) - 1
    block = last // PAGE
    inside = live & (last >= 0) & (block < num_blocks)
    page = tl.load(tables_ptr + row.to(tl.int64) * stride_table + block, mask=inside, other=-1).to(tl.int64)
    tl.store(slots_ptr + row, tl.where(page >= 0, page * PAGE + last % PAGE, -1), mask=live)


def next_slots(
    tables: Tensor, lens: Tensor, page_size: int, *, out: Tensor | None = None, impl: Impl | None = None
) -> Tensor:
    """Slots [B] int64 of the last of `lens` [B] int32 tokens of each row of `tables` [B, MB] int32.

    The result goes to `out` if given. Raises ValueError on shapes, dtypes or an `impl` that do not fit.
    """
    check_shapes(lens=(lens, tables.shape[:1]))
    check_integers(torch.int32, tables=tables, lens=lens)
    if out is None:
        out = torch.empty(len(lens), dtype=torch.int64, device=lens.device)
    if resolve_impl(impl, lens) == "reference":
        return out.copy_(next_slots_reference(tables, lens, page_size))
    if len(lens) > 0:
        _slots_kernel[(triton.cdiv(len(lens), BLOCK),)](
            tables, lens, out, len(lens), tables.stride(0), tables.shape[1], page_size, BLOCK
        )
    return out


@jit(do_not_specialize=["num_rows", "num_kept"])
def _advance_kernel(
    ids_ptr, logprobs_ptr, tokens_ptr, positions_ptr, draw_positions_ptr, lens_ptr, counts_ptr, history_ptr,
    num_rows, num_kept, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_rows
    ids = tl.load(ids_ptr + row, mask=live, other=0)
    logprobs = tl.load(logprobs_ptr + row, mask=live, other=0.0)
    count = tl.load(counts_ptr + row, mask=live, other=0)
    kept = history_ptr + (count % num_kept) * 2 * num_rows + row
    tl.store(kept, ids.to(tl.int32), mask=live)
    tl.store(kept + num_rows, logprobs.to(tl.int32, bitcast=True), mask=live)
    tl.store(counts_ptr + row, count + 1, mask=live)
    tl.store(tokens_ptr + row, ids, mask=live)
    position = tl.load(positions_ptr + row, mask=live, other=0)
    tl.store(positions_ptr + row, position + 1, mask=live)
    draw_position = tl.load(draw_positions_ptr + row, mask=live, other=0)
    tl.store(draw_positions_ptr + row, draw_position + 1, mask=live)
    length = tl.load(lens_ptr + row, mask=live, other=0)
    tl.store(lens_ptr + row, tl.where(length > 0, length + 1, 0), mask=live)


def advance(
    ids: Tensor,
    logprobs: Tensor,
    tokens: Tensor,
    positions: Tensor,
    draw_positions: Tensor,
    lens: Tensor,
    counts: Tensor,
    history: Tensor,
    *,
    impl: Impl | None = None,
) -> None:
    """Make the ids just drawn the next step's tokens, in place.

    ids, tokens, positions, draw_positions, counts: int64 [B]; logprobs: float32 [B]; lens: int32 [B];
    history: int32 [T, 2, B] contiguous; `counts` is the same in every row, and one a row so that no row waits for
    another. Raises ValueError on shapes, dtypes or an `impl` that do not fit.
    """
    shape = ids.shape
    check_integers(torch.int64, ids=ids, tokens=tokens, positions=positions)
    check_integers(torch.int64, draw_positions=draw_positions, counts=counts)
    check_integers(torch.int32, lens=lens, history=history)
    check_shapes(logprobs=(logprobs, shape), tokens=(tokens, shape), positions=(positions, shape))
    check_shapes(draw_positions=(draw_positions, shape), lens=(lens, shape), counts=(counts, shape))
    check_shapes(history=(history, (len(history), 2, *shape)))
    if resolve_impl(impl, ids) == "reference":
        drawn = torch.stack([ids.to(torch.int32), logprobs.view(torch.int32)])
        history.index_copy_(0, counts[:1] % len(history), drawn[None])
        tokens.copy_(ids)
        lens.add_((lens > 0).to(torch.int32))
        for number in (positions, draw_positions, counts):
            number.add_(1)
    elif len(ids) > 0:
        _advance_kernel[(triton.cdiv(len(ids), BLOCK),)](
            ids, logprobs, tokens, positions, draw_positions, lens, counts, history, len(ids), len(history), BLOCK
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """The configurations to check for sm_90."""
    wide = ("ids_ptr", "tokens_ptr", "positions_ptr", "draw_positions_ptr", "counts_ptr")
    advancing = dict.fromkeys(wide, "*i64:16") | dict.fromkeys(("lens_ptr", "history_ptr"), "*i32:16")
    advancing |= {"logprobs_ptr": "*fp32:16", "num_rows": "i32", "num_kept": "i32"}
    placing = {"tables_ptr": "*i32:16", "lens_ptr": "*i32:16", "slots_ptr": "*i64:16"}
    placing |= dict.fromkeys(("num_rows", "stride_table", "num_blocks"), "i32")
    return [
        CompileCase("decode_step slots", _slots_kernel, placing, {"PAGE": 16, "BLOCK": BLOCK}),
        CompileCase("decode_step advance", _advance_kernel, advancing, {"BLOCK": BLOCK}),
    ]
