"""Sampling from the output head by Gumbel-max, never writing the logits. Forward only.

B: rows (sequences), H: hidden size, V: vocabulary columns of this shard, T: temperature, g: Gumbel noise.

    logits[b, v] = sum_h hidden[b, h] * weight[v, h]                       (float32)
    token[b]     = argmax_v logits[b, v] / T + g(keys[b], positions[b], v)  ~ softmax(logits[b] / T)

The argmax, and the log-sum-exp for the token's log-prob, split over any partition of the vocabulary: a tile
of the kernel, or a tensor-parallel shard, reports five numbers a row, and the winner of winners is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sip_engine.kernels._impl import Impl, resolve_impl
from sip_engine.kernels._tiles import Tile, tile_of
from sip_engine.kernels._triton import jit, tl, triton
from sip_engine.kernels.compile_report import CompileCase
from sip_engine.kernels.random import check_counters, gumbel, gumbel_tile, tile_columns

MIN_TEMPERATURE = 1e-30
"""Below it, logits / T leaves the range of float32."""


class ShardSample(NamedTuple):
    """What one vocabulary shard found: 20 bytes a row. Fields are [B], or [shards, B] when stacked.

    A NaN or +inf among a row's logits makes its `sum_exp` NaN and its token -1; the other fields then
    mean nothing. A row without any column to choose from has token -1, sum_exp 0 and -inf elsewhere.
    """

    perturbed: Tensor
    """float32: the largest logit / T + noise; in greedy sampling the largest logit."""
    token: Tensor
    """int64: global id of the column it belongs to (on a tie the lowest), or -1."""
    logit: Tensor
    """float32: the logit of that column, before temperature and noise."""
    max: Tensor
    """float32: the largest logit."""
    sum_exp: Tensor
    """float32: sum over this shard of exp(logit - max)."""

    def pack(self) -> Tensor:
        """All fields in one float32 tensor [..., 5], for one collective; the token travels as int32 bits."""
        token = self.token.to(torch.int32).view(torch.float32)
        return torch.stack([self.perturbed, token, self.logit, self.max, self.sum_exp], dim=-1)

    @classmethod
    def unpack(cls, packed: Tensor) -> ShardSample:
        """The inverse of `pack`."""
        perturbed, token, logit, largest, sum_exp = packed.unbind(-1)
        return cls(perturbed, token.contiguous().view(torch.int32).long(), logit, largest, sum_exp)


def find_best(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    temperature: float,
    vocab_start: int,
    impl: Impl | None,
    keep: Tensor | None = None,
) -> ShardSample:
    """The definition, given logits [B, V] without padding; `impl` is that of the noise.

    keep: bool [B, V], the columns that may be chosen, at least one a row; None for all.
    """
    logits = logits.float()
    perturbed = logits
    if temperature > 0:
        columns = torch.arange(vocab_start, vocab_start + logits.shape[1], device=logits.device)
        perturbed = gumbel(keys, positions, columns, impl=impl).add_(logits, alpha=1.0 / temperature)
    if keep is not None:
        perturbed = perturbed.masked_fill(~keep, -torch.inf)
    best = perturbed.argmax(dim=1, keepdim=True)
    largest = logits.amax(dim=1, keepdim=True)
    sum_exp = (logits - largest.masked_fill(largest == -torch.inf, 0.0)).exp_().sum(dim=1)
    return ShardSample(
        perturbed=perturbed.gather(1, best)[:, 0],
        token=torch.where(sum_exp > 0, best[:, 0] + vocab_start, -1),
        logit=logits.gather(1, best)[:, 0],
        max=largest[:, 0],
        sum_exp=sum_exp,
    )


def sample_reference(
    hidden: Tensor, weight: Tensor, keys: Tensor, positions: Tensor, temperature: float, vocab_start: int
) -> ShardSample:
    """The definition, in plain torch; every row of `weight` may be chosen. See `sample`."""
    logits = hidden.float() @ weight.float().T
    return find_best(logits, keys, positions, temperature, vocab_start, impl="reference")


def merge_shards(stacked: ShardSample) -> tuple[Tensor, Tensor]:
    """Token, int64 [B], and its log-prob, float32 [B] (nats), of findings [shards, B] in vocabulary order.

    The log-prob is the log-softmax of the raw logits: temperature 1, nothing cut off, however it was drawn.
    A row with a NaN or +inf logit, or nothing to choose from, has token -1 and log-prob NaN.
    """
    best = stacked.perturbed.argmax(dim=0, keepdim=True)
    largest = stacked.max.amax(dim=0)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)  # without any column the log-prob is -inf + inf
    sum_exp = (stacked.sum_exp * (stacked.max - shift).exp()).sum(dim=0)
    logprob = stacked.logit.gather(0, best)[0] - shift - sum_exp.log()
    return stacked.token.gather(0, best)[0].where(sum_exp > 0, -1), logprob


def finish_sample(found: ShardSample) -> tuple[Tensor, Tensor]:
    """`merge_shards` of one shard's findings, [B] each, in fewer steps and with the same bits."""
    shift = found.max.masked_fill(found.max == -torch.inf, 0.0)
    logprob = found.logit - shift - found.sum_exp.log()
    return found.token.where(found.sum_exp > 0, -1), logprob


@jit(do_not_specialize=["num_rows"])
def head_sample_kernel(
    hidden_ptr,
    weight_ptr,
    keys_ptr,
    positions_ptr,
    partial_ptr,
    num_rows,
    num_columns,
    hidden_stride,
    weight_stride,
    vocab_start,
    inverse_temperature,
    GREEDY: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program computes a tile of logits and leaves its findings in partial [5, rows, tiles].

    Row blocks vary fastest, so that each tile of the weight is read from memory once.
    """
    num_row_blocks = tl.cdiv(num_rows, BLOCK_B)
    num_tiles = tl.cdiv(num_columns, BLOCK_V)
    tile = tl.program_id(0) // num_row_blocks
    row = (tl.program_id(0) % num_row_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tile * BLOCK_V + tile_columns(BLOCK_V)
    is_row, is_column = row < num_rows, column < num_columns

    inner = tl.arange(0, BLOCK_H)
    hidden_ptrs = hidden_ptr + row.to(tl.int64)[:, None] * hidden_stride + inner[None, :]
    weight_ptrs = weight_ptr + column.to(tl.int64)[None, :] * weight_stride + inner[:, None]
    logits = tl.zeros([BLOCK_B, BLOCK_V], dtype=tl.float32)
    for start in range(0, HIDDEN_SIZE, BLOCK_H):
        inside = inner < HIDDEN_SIZE - start
        hidden = tl.load(hidden_ptrs + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_ptrs + start, mask=is_column[None, :] & inside[:, None], other=0.0)
        logits = tl.dot(hidden, weight, logits, input_precision="tf32x3")

    logits = tl.where(is_column[None, :], logits, -float("inf"))
    perturbed = logits
    if not GREEDY:
        keys = tl.load(keys_ptr + row, mask=is_row, other=0)[:, None]
        positions = tl.load(positions_ptr + row, mask=is_row, other=0)[:, None]
        noise = gumbel_tile(keys, positions, vocab_start + tile * BLOCK_V, BLOCK_B, BLOCK_V)
        perturbed = logits * inverse_temperature + noise
    best = tl.max(perturbed, axis=1)
    winner = tl.min(tl.where(perturbed == best[:, None], column[None, :], 2**31 - 1), axis=1)
    logit = tl.max(tl.where(column[None, :] == winner[:, None], logits, -float("inf")), axis=1)
    largest = tl.max(logits, axis=1)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    sum_exp = tl.sum(tl.exp(logits - shift[:, None]), axis=1)

    partial = partial_ptr + row.to(tl.int64) * num_tiles + tile
    field = tl.cast(num_rows, tl.int64) * num_tiles
    tl.store(partial, best, mask=is_row)
    tl.store(partial + field, winner.to(tl.float32, bitcast=True), mask=is_row)
    tl.store(partial + 2 * field, logit, mask=is_row)
    tl.store(partial + 3 * field, largest, mask=is_row)
    tl.store(partial + 4 * field, sum_exp, mask=is_row)


@jit(do_not_specialize=["num_rows"])
def merge_tiles_kernel(
    partial_ptr,
    perturbed_ptr,
    token_ptr,
    logit_ptr,
    max_ptr,
    sum_exp_ptr,
    num_rows,
    num_tiles,
    vocab_start,
    BLOCK_B: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """One program for BLOCK_B rows: the findings of all tiles become the shard's."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    tile = tl.arange(0, BLOCK_TILES)[None, :]
    is_row = row < num_rows
    mask = is_row[:, None] & (tile < num_tiles)
    partial = partial_ptr + row.to(tl.int64)[:, None] * num_tiles + tile
    field = tl.cast(num_rows, tl.int64) * num_tiles
    perturbed = tl.load(partial, mask=mask, other=-float("inf"))
    column = tl.load(partial + field, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    logit = tl.load(partial + 2 * field, mask=mask, other=-float("inf"))
    tile_max = tl.load(partial + 3 * field, mask=mask, other=-float("inf"))
    tile_sum = tl.load(partial + 4 * field, mask=mask, other=0.0)

    largest = tl.max(tile_max, axis=1)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    sum_exp = tl.sum(tile_sum * tl.exp(tile_max - shift[:, None]), axis=1)
    best = tl.max(perturbed, axis=1)
    winner = tl.min(tl.where(perturbed == best[:, None], column, 2**31 - 1), axis=1)
    tl.store(perturbed_ptr + row, best, mask=is_row)
    tl.store(token_ptr + row, tl.where(sum_exp > 0, vocab_start + winner.to(tl.int64), -1), mask=is_row)
    best_logit = tl.max(tl.where(column == winner[:, None], logit, -float("inf")), axis=1)
    tl.store(logit_ptr + row, best_logit, mask=is_row)
    tl.store(max_ptr + row, largest, mask=is_row)
    tl.store(sum_exp_ptr + row, sum_exp, mask=is_row)


def _block_sizes(tile: Tile) -> dict[str, int]:
    """The same for every batch, so that a row's result does not depend on its company."""
    return {"BLOCK_B": tile.block_m, "BLOCK_V": tile.block_n, "BLOCK_H": tile.block_k}


def _merge_block_sizes(num_tiles: int) -> dict[str, int]:
    """All tiles of as many rows as make 1024 numbers."""
    block_tiles = 1 << (num_tiles - 1).bit_length()
    return {"BLOCK_B": max(1, 1024 // block_tiles), "BLOCK_TILES": block_tiles}


def _launch(
    hidden: Tensor, weight: Tensor, keys: Tensor, positions: Tensor, temperature: float, vocab_start: int
) -> ShardSample:
    """Run the two kernels; every row of `weight` may be chosen."""
    (num_rows, hidden_size), num_columns = hidden.shape, weight.shape[0]
    tile = tile_of("head_sample", hidden.element_size())
    blocks = _block_sizes(tile)
    num_tiles = -(-num_columns // blocks["BLOCK_V"])
    partial = torch.empty((5, num_rows, num_tiles), dtype=torch.float32, device=hidden.device)
    head_sample_kernel[(triton.cdiv(num_rows, blocks["BLOCK_B"]) * num_tiles,)](
        hidden,
        weight,
        keys.contiguous(),
        positions.contiguous(),
        partial,
        num_rows,
        num_columns,
        hidden.stride(0),
        weight.stride(0),
        vocab_start,
        1.0 / temperature if temperature > 0 else 1.0,
        GREEDY=temperature == 0,
        HIDDEN_SIZE=hidden_size,
        **blocks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    floats = torch.empty((4, num_rows), dtype=torch.float32, device=hidden.device)
    found = ShardSample(floats[0], torch.empty_like(keys), floats[1], floats[2], floats[3])
    merge_blocks = _merge_block_sizes(num_tiles)
    merge_tiles_kernel[(triton.cdiv(num_rows, merge_blocks["BLOCK_B"]),)](
        partial, *found, num_rows, num_tiles, vocab_start, **merge_blocks
    )
    return found


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is 0 or finite and not too small to divide by."""
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(
            f"temperature={temperature} must be finite, and 0 (greedy) or at least {MIN_TEMPERATURE}"
        )


def _num_true_columns(num_columns: int, vocab_start: int, vocab_size: int | None) -> int:
    """How many of this shard's columns are tokens and not padding."""
    if vocab_size is None:
        return num_columns
    return max(0, min(num_columns, vocab_size - vocab_start))


def _nothing_found(keys: Tensor) -> ShardSample:
    """The findings of a shard that is all padding."""
    lowest = torch.full(keys.shape, -torch.inf, device=keys.device)
    return ShardSample(lowest, torch.full_like(keys, -1), lowest, lowest, torch.zeros_like(lowest))


def sample(
    hidden: Tensor,
    weight: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    impl: Impl | None = None,
) -> ShardSample:
    """Sample a token a row from softmax(hidden @ weight.T / temperature), as far as this shard can.

    hidden: [B, H]; weight: [V, H] of the same dtype, this shard's rows of the output head.
    keys, positions: int64 [B], the sequence's random key and the position of the token to be drawn.
    temperature: 0 is greedy: no noise, and the lowest id wins a tie.
    vocab_start: global id of weight's first row; a multiple of 4 for impl="triton".
    vocab_size: global number of true tokens; ids from it on are padding and never chosen.

    `merge_shards` of all shards' findings (one or more) gives the token and its log-prob. No row's result
    depends on another row: the kernel's tiles are the same for every batch, while the reference is as
    independent as torch's matmul. Raises ValueError on arguments that break the above.
    """
    if hidden.shape[1:] != weight.shape[1:] or hidden.ndim != 2 or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {hidden.dtype} {list(hidden.shape)} and weight {weight.dtype} {list(weight.shape)} "
            "must be [B, H] and [V, H] of one dtype"
        )
    check_counters(keys, positions, hidden.shape[0])
    check_temperature(temperature)
    num_columns = _num_true_columns(weight.shape[0], vocab_start, vocab_size)
    if num_columns == 0:
        return _nothing_found(keys)
    weight = weight[:num_columns]
    if resolve_impl(impl, hidden) == "reference":
        return sample_reference(hidden, weight, keys, positions, temperature, vocab_start)
    if vocab_start % 4:
        raise ValueError(f"vocab_start={vocab_start} must be a multiple of 4: pad the shards to one")
    return _launch(hidden.contiguous(), weight.contiguous(), keys, positions, temperature, vocab_start)


def sample_from_logits(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    impl: Impl | None = None,
) -> ShardSample:
    """`sample` for callers that have this shard's logits [B, V] already. Same arguments, results and errors.

    Plain torch on every device: `impl` picks the implementation of the noise only.
    """
    check_counters(keys, positions, logits.shape[0])
    check_temperature(temperature)
    num_columns = _num_true_columns(logits.shape[1], vocab_start, vocab_size)
    if num_columns == 0:
        return _nothing_found(keys)
    return find_best(logits[:, :num_columns], keys, positions, temperature, vocab_start, impl)


def compile_cases() -> list[CompileCase]:
    """The configurations to check for sm_90."""
    integers = ("hidden_stride", "weight_stride", "vocab_start")
    signature = {
        **dict.fromkeys(("keys_ptr", "positions_ptr"), "*i64:16"),
        **dict.fromkeys(("num_rows", "num_columns"), "i32"),
        **dict.fromkeys(integers, "i32:16"),
        "partial_ptr": "*fp32:16",
        "inverse_temperature": "fp32",
    }
    narrow = tile_of("head_sample", 2)
    heads = [
        CompileCase(
            name=f"head_sample {short}{' greedy' if greedy else ''}",
            kernel=head_sample_kernel,
            signature=signature | dict.fromkeys(("hidden_ptr", "weight_ptr"), f"*{short}:16"),
            constexprs={"GREEDY": greedy, "HIDDEN_SIZE": 2048, **_block_sizes(tile)},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            expect_wgmma=True,
        )
        for short, tile, greedy in (
            ("bf16", narrow, False),
            ("bf16", narrow, True),
            ("fp32", tile_of("head_sample", 4), False),
        )
    ]
    outputs = ("partial_ptr", "perturbed_ptr", "logit_ptr", "max_ptr", "sum_exp_ptr")
    merges = [
        CompileCase(
            name=f"merge_tiles V={num_columns}",
            kernel=merge_tiles_kernel,
            signature=dict.fromkeys(outputs, "*fp32:16")
            | {"token_ptr": "*i64:16", "vocab_start": "i32:16", "num_rows": "i32", "num_tiles": "i32"},
            constexprs=_merge_block_sizes(num_columns // narrow.block_n),
        )
        for num_columns in (32_000, 128_000)
    ]
    return [*heads, *merges]
