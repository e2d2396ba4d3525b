"""Triton kernels of the log-prob head: statistics of the logits' rows, and the gradients, tile by tile.

N: tokens, H: hidden size, V: vocabulary columns of this shard that are tokens.

Forward: a program walks the tiles of SPLIT columns for BLOCK_N tokens and keeps three or four numbers a token.
Backward, for a chunk of tokens and columns at a time: one kernel computes the logits again and writes
dlogits = grad * (onehot - softmax) of the chunk; another adds dlogits @ weight to d hidden and
dlogits.T @ hidden to d weight (`_logprob_gradients.py`). Every output element has one writer and a fixed order of
sums: no atomics, and the same bits every time. Chunks, splits and tiles do not depend on the batch, so neither does
a token's result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sip_engine.kernels._tiles import Tile, tile_of
from sip_engine.kernels._triton import jit, tl
from sip_engine.kernels.compile_report import CompileCase

IGNORED = -100
"""Target of a token that is not scored."""
SPLIT = 4096
"""Columns of one program of the forward pass; its findings are 12 bytes a token."""
CHUNK_ROWS, CHUNK_COLUMNS = 8192, 8192
"""Tokens and columns whose dlogits exist at a time; multiples of the tiles."""
GROUP = 16
"""Row blocks that are worked on together, so that they and the weights they share stay in the L2 cache."""


@jit
def grouped_block(program, num_row_blocks, num_column_blocks, GROUP: tl.constexpr):
    """Row and column block of a program: GROUP row blocks take all column blocks before the next rows."""
    in_group = GROUP * num_column_blocks
    first = program // in_group * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@jit
def logits_tile(
    hidden_ptr, weight_ptr, row, column, hidden_stride, weight_stride,
    HIDDEN_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """hidden[row] @ weight[column].T, float32 [BLOCK_N, BLOCK_V]. Rows and columns must exist."""
    inner = tl.arange(0, BLOCK_H)
    hidden_ptrs = hidden_ptr + row.to(tl.int64)[:, None] * hidden_stride + inner[None, :]
    weight_ptrs = weight_ptr + column.to(tl.int64)[None, :] * weight_stride + inner[:, None]
    logits = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    for start in range(0, HIDDEN_SIZE, BLOCK_H):
        if HIDDEN_SIZE % BLOCK_H == 0:
            hidden = tl.load(hidden_ptrs + start)
            weight = tl.load(weight_ptrs + start)
        else:
            inside = inner < HIDDEN_SIZE - start
            hidden = tl.load(hidden_ptrs + start, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs + start, mask=inside[:, None], other=0.0)
        logits = tl.dot(hidden, weight, logits, input_precision="tf32x3")
    return logits


@jit
def local_target(targets_ptr, row, vocab_start, num_columns):
    """Each row's target as a column of this shard, or -1 where another shard has it or none."""
    target = tl.load(targets_ptr + row) - vocab_start
    return tl.where((target >= 0) & (target < num_columns), target, -1).to(tl.int32)


@jit(do_not_specialize=["num_rows"])
def head_stats_kernel(
    hidden_ptr, weight_ptr, targets_ptr, found_ptr, num_rows, num_columns, hidden_stride, weight_stride,
    vocab_start, ENTROPY: tl.constexpr, HIDDEN_SIZE: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """BLOCK_N tokens over one split of the vocabulary; findings go to found [splits, 3 or 4, rows].

        m' = max(m, max_v l)     z' = z e^(m - m') + sum_v e^(l - m')     t = l[target], or -inf
        u' = e^(m - m') (u + (m - m') z) + sum_v e^(l - m') (l - m')      (for the entropy)

    A NaN or +inf among the logits makes z NaN.
    """
    num_splits = tl.cdiv(num_columns, SPLIT)
    block, split = grouped_block(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), num_splits, GROUP)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < num_rows
    row = tl.minimum(row, num_rows - 1)
    target = local_target(targets_ptr, row, vocab_start, num_columns)

    m = tl.full([BLOCK_N], -float("inf"), tl.float32)
    z = tl.zeros([BLOCK_N], tl.float32)
    t = tl.full([BLOCK_N], -float("inf"), tl.float32)
    u = tl.zeros([BLOCK_N], tl.float32)
    begin = split * SPLIT
    for first in range(begin, tl.minimum(begin + SPLIT, num_columns), BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        logits = logits_tile(
            hidden_ptr, weight_ptr, row, tl.minimum(column, num_columns - 1), hidden_stride, weight_stride,
            HIDDEN_SIZE, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        logits = tl.where((column < num_columns)[None, :], logits, -float("inf"))
        hit = column[None, :] == target[:, None]
        t = tl.maximum(t, tl.max(tl.where(hit, logits, -float("inf")), axis=1))
        m_new = tl.maximum(m, tl.max(logits, axis=1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        rescale = tl.exp(m - shift)
        logits -= shift[:, None]
        exp = tl.exp(logits)
        if ENTROPY:
            u = rescale * (u + tl.where(m == -float("inf"), 0.0, m - shift) * z)
            u += tl.sum(tl.where(exp > 0, exp * logits, 0.0), axis=1)
        z = z * rescale + tl.sum(exp, axis=1)
        m = m_new

    num_fields = 4 if ENTROPY else 3
    found = found_ptr + split.to(tl.int64) * num_fields * num_rows + row
    tl.store(found, m, mask=is_row)
    tl.store(found + num_rows, z, mask=is_row)
    tl.store(found + 2 * num_rows, t, mask=is_row)
    if ENTROPY:
        tl.store(found + 3 * num_rows, u, mask=is_row)


@jit(do_not_specialize=["num_rows"])
def dlogits_kernel(
    hidden_ptr, weight_ptr, targets_ptr, lse_ptr, grad_ptr, out_ptr, num_rows, num_columns,
    hidden_stride, weight_stride, out_stride, vocab_start,
    HIDDEN_SIZE: tl.constexpr, GROUP: tl.constexpr, IGNORED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile of out[n, v] = grad[n] * ([v is n's target] - e^(logit - lse[n])), zero for ignored targets.

    Whole tiles are written; what lies past the last row and column is finite where they are, and means nothing.
    """
    num_column_blocks = tl.cdiv(num_columns, BLOCK_V)
    block, column_block = grouped_block(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), num_column_blocks, GROUP
    )
    out_row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(out_row, num_rows - 1)
    column = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = logits_tile(
        hidden_ptr, weight_ptr, row, tl.minimum(column, num_columns - 1), hidden_stride, weight_stride,
        HIDDEN_SIZE, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    is_live = tl.load(targets_ptr + row) != IGNORED
    target = local_target(targets_ptr, row, vocab_start, num_columns)
    grad = tl.load(grad_ptr + row)
    prob = tl.exp(logits - tl.load(lse_ptr + row)[:, None])
    onehot = tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    dlogits = tl.where(is_live[:, None], grad[:, None] * (onehot - prob), 0.0)
    out_ptrs = out_ptr + out_row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out_ptrs, dlogits.to(out_ptr.dtype.element_ty))


@jit
def store_sum(
    total, out_ptr, low_ptr, row, column, num_rows, out_stride, ADD: tl.constexpr, HIDDEN_SIZE: tl.constexpr
):  # fmt: skip
    """Write `total`, float32, to out and low at [row, column]; with ADD, what is there is added to it."""
    is_out = (row < num_rows)[:, None] & (column < HIDDEN_SIZE)[None, :]
    offsets = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    if ADD:
        total += tl.load(out_ptr + offsets, mask=is_out, other=0.0).to(tl.float32)
        if low_ptr is not None:
            total += tl.load(low_ptr + offsets, mask=is_out, other=0.0).to(tl.float32)
    high = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, high, mask=is_out)
    if low_ptr is not None:
        tl.store(low_ptr + offsets, (total - high.to(tl.float32)).to(high.dtype), mask=is_out)


@jit(do_not_specialize=["num_rows", "num_inner"])
def accumulate_kernel(
    a_ptr, b_ptr, out_ptr, low_ptr, num_rows, num_inner, a_stride, b_stride, out_stride,
    TRANSPOSED: tl.constexpr, ADD: tl.constexpr, HIDDEN_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out [rows, H] = A @ B, or with ADD out += A @ B; A is a, or with TRANSPOSED a.T.

    a: whole tiles in memory, finite past the last row and inner index. b: [inner, H].
    low: None, or what rounding took from `out`, of its dtype and layout: out + low carries twice the bits of
    a 16-bit sum from chunk to chunk, in the place of a float32 copy of `out`.
    """
    num_blocks = tl.cdiv(HIDDEN_SIZE, BLOCK_H)
    row = tl.program_id(0) // num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    inner = tl.arange(0, BLOCK_K)
    if TRANSPOSED:
        a_ptrs = a_ptr + inner.to(tl.int64)[None, :] * a_stride + row[:, None]
    else:
        a_ptrs = a_ptr + row.to(tl.int64)[:, None] * a_stride + inner[None, :]
    b_ptrs = b_ptr + inner.to(tl.int64)[:, None] * b_stride + column[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for start in range(0, num_inner, BLOCK_K):
        a = tl.load(a_ptrs)
        inside = (inner < num_inner - start)[:, None]
        if HIDDEN_SIZE % BLOCK_H != 0:
            inside &= (column < HIDDEN_SIZE)[None, :]
        b = tl.load(b_ptrs, mask=inside, other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
        a_ptrs += BLOCK_K * tl.cast(a_stride, tl.int64) if TRANSPOSED else BLOCK_K
        b_ptrs += BLOCK_K * tl.cast(b_stride, tl.int64)

    # In halves, because a whole tile of old sums beside the new ones does not fit into the registers.
    left, right = total.reshape(BLOCK_M, 2, BLOCK_H // 2).permute(0, 2, 1).split()
    column = tl.program_id(0) % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H // 2)
    store_sum(left, out_ptr, low_ptr, row, column, num_rows, out_stride, ADD, HIDDEN_SIZE)
    store_sum(right, out_ptr, low_ptr, row, column + BLOCK_H // 2, num_rows, out_stride, ADD, HIDDEN_SIZE)


def _num_blocks(size: int, block: int) -> int:
    return -(-size // block)


def _product_blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_N": tile.block_m, "BLOCK_V": tile.block_n, "BLOCK_H": tile.block_k}


def _sum_blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_H": tile.block_n, "BLOCK_K": tile.block_k}


def _with_unit_stride(x: Tensor) -> Tensor:
    """`x` [rows, H], copied if its rows are not contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def launch_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int, entropy: bool
) -> tuple[Tensor, ...]:
    """max, sum_exp, target_logit and, for the entropy, sum_exp_logit of each split: float32 [splits, N]."""
    (num_rows, hidden_size), num_columns = hidden.shape, weight.shape[0]
    hidden, weight = _with_unit_stride(hidden), _with_unit_stride(weight)
    tile = tile_of("logprob_stats", hidden.element_size())
    num_splits = _num_blocks(num_columns, SPLIT)
    found = torch.empty((num_splits, 3 + entropy, num_rows), dtype=torch.float32, device=hidden.device)
    head_stats_kernel[(_num_blocks(num_rows, tile.block_m) * num_splits,)](
        hidden,
        weight,
        targets.contiguous(),
        found,
        num_rows,
        num_columns,
        hidden.stride(0),
        weight.stride(0),
        vocab_start,
        ENTROPY=entropy,
        HIDDEN_SIZE=hidden_size,
        SPLIT=SPLIT,
        GROUP=GROUP,
        **_product_blocks(tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return found.unbind(1)


def _launch_dlogits(
    hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, out: Tensor, vocab_start: int
) -> None:
    """Fill the whole tiles of `out` that the rows of `hidden` and `weight` touch."""
    (num_rows, hidden_size), num_columns = hidden.shape, weight.shape[0]
    tile = tile_of("logprob_dlogits", hidden.element_size())
    dlogits_kernel[(_num_blocks(num_rows, tile.block_m) * _num_blocks(num_columns, tile.block_n),)](
        hidden,
        weight,
        targets,
        lse,
        grad,
        out,
        num_rows,
        num_columns,
        hidden.stride(0),
        weight.stride(0),
        out.stride(0),
        vocab_start,
        HIDDEN_SIZE=hidden_size,
        GROUP=GROUP,
        IGNORED=IGNORED,
        **_product_blocks(tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _launch_accumulate(
    a: Tensor, b: Tensor, out: Tensor, low: Tensor | None, *, add: bool, transposed: bool
) -> None:
    """out (+)= a @ b, or a.T @ b; see the kernel."""
    num_rows, hidden_size = out.shape
    tile = tile_of("logprob_sum", b.element_size())
    accumulate_kernel[(_num_blocks(num_rows, tile.block_m) * _num_blocks(hidden_size, tile.block_n),)](
        a,
        b,
        out,
        low,
        num_rows,
        b.shape[0],
        a.stride(0),
        b.stride(0),
        out.stride(0),
        TRANSPOSED=transposed,
        ADD=add,
        HIDDEN_SIZE=hidden_size,
        **_sum_blocks(tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _dlogits_shape(num_rows: int, num_columns: int, element_bytes: int) -> tuple[int, int]:
    """A chunk's size in whole tiles of both kernels that touch it: one writes its own, the other reads its own."""
    made, read = tile_of("logprob_dlogits", element_bytes), tile_of("logprob_sum", element_bytes)
    # What one leaves unwritten may be read as rows that are thrown away, never as a term of a sum.
    assert read.block_k <= min(made.block_m, made.block_n), "tiles.csv: logprob_sum reads what nobody wrote"
    row_block, column_block = max(made.block_m, read.block_m), max(made.block_n, read.block_m)
    return _num_blocks(num_rows, row_block) * row_block, _num_blocks(num_columns, column_block) * column_block


def compile_cases() -> list[CompileCase]:
    """The configurations to check for sm_90."""
    return [*_cases_of(torch.bfloat16, "bf16"), *_cases_of(torch.float32, "fp32")]


def _cases_of(dtype: torch.dtype, short: str) -> list[CompileCase]:
    size = dtype.itemsize
    own = ("hidden_ptr", "weight_ptr", "a_ptr", "b_ptr", "out_ptr", "low_ptr")
    strides = ("hidden_stride", "weight_stride", "out_stride", "a_stride", "b_stride", "vocab_start")
    signature = {
        **dict.fromkeys(own, f"*{short}:16"),
        **dict.fromkeys(("found_ptr", "lse_ptr", "grad_ptr"), "*fp32:16"),
        **dict.fromkeys(("num_rows", "num_columns", "num_inner"), "i32"),
        **dict.fromkeys(strides, "i32:16"),
        "targets_ptr": "*i64:16",
    }

    def case(name: str, kernel: Any, tile: Tile, blocks: dict[str, int], **constexprs: Any) -> CompileCase:
        constexprs = {"HIDDEN_SIZE": 2048, **blocks, **constexprs}
        taken = {each: signature[each] for each in kernel.arg_names if each not in constexprs}
        return CompileCase(
            f"logprob {name} {short}", kernel, taken, constexprs, tile.num_warps, tile.num_stages, True
        )

    stats, dlogits, total = (tile_of(f"logprob_{name}", size) for name in ("stats", "dlogits", "sum"))
    walk, blocks, sums = _product_blocks(stats), _product_blocks(dlogits), _sum_blocks(total)
    low = {} if size == 2 else {"low_ptr": None}
    return [
        case("stats", head_stats_kernel, stats, walk, ENTROPY=False, SPLIT=SPLIT, GROUP=GROUP),
        case("stats + entropy", head_stats_kernel, stats, walk, ENTROPY=True, SPLIT=SPLIT, GROUP=GROUP),
        case("dlogits", dlogits_kernel, dlogits, blocks, GROUP=GROUP, IGNORED=IGNORED),
        case("d hidden", accumulate_kernel, total, sums, TRANSPOSED=False, ADD=True, **low),
        case("d weight", accumulate_kernel, total, sums, TRANSPOSED=True, ADD=True, **low),
    ]
