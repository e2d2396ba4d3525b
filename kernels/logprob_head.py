"""Log-probs of target tokens from hidden states and the output head, without the logits of all tokens at once.

N: tokens, H: hidden size, V: vocabulary columns of this shard.

    logits[n, v] = sum_h hidden[n, h] * weight[v, h]                       (float32, or float64 for float64)
    log_prob[n]  = logits[n, targets[n]] - log sum_v exp(logits[n, v])     (nats)
    d log_prob[n] / d logits[n, v] = [v = targets[n]] - softmax(logits[n])[v]

Log-sum-exp splits over any partition of the vocabulary: a tile of the kernel, or a tensor-parallel shard, reports
three numbers a token (four with the entropy), and merging them is exact. The backward pass computes the logits
again, from log-sum-exp, and never needs another shard's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sip_engine.kernels import _logprob_triton as fused
from sip_engine.kernels._impl import resolve_impl, uses_triton
from sip_engine.kernels._logprob_gradients import launch_gradients, launch_gradients_library
from sip_engine.kernels._logprob_triton import IGNORED
from sip_engine.kernels.compile_report import CompileCase
from sip_engine.kernels.sample import _num_true_columns

LogProbImpl = Literal["reference", "chunked", "triton", "library"]
Gather = Callable[[Tensor], Tensor]
"""Float tensor [N, F] of this shard -> [shards, N, F] of all, in vocabulary order and the same on each."""

TILE_ELEMENTS, TILE_COLUMNS = 1 << 20, 2048
"""Logits that "chunked" computes at a time, and the most columns they span: 4 MB in float32."""


class ShardStats(NamedTuple):
    """What one vocabulary shard knows of each token. Fields are [N], or [shards, N] when stacked.

    A NaN or +inf among a token's logits makes its `sum_exp` NaN, and with it all that is merged from it.
    A shard without columns has sum_exp 0 and -inf in `max` and `target_logit`.
    """

    max: Tensor
    """The largest logit."""
    sum_exp: Tensor
    """sum over this shard of exp(logit - max)."""
    target_logit: Tensor
    """The target's logit; -inf where the target is not one of this shard's columns."""
    sum_exp_logit: Tensor | None = None
    """sum over this shard of exp(logit - max) * (logit - max), for the entropy."""

    def pack(self) -> Tensor:
        """All fields in one tensor [..., 3 or 4], for one collective."""
        return torch.stack([field for field in self if field is not None], dim=-1)

    @classmethod
    def unpack(cls, packed: Tensor) -> ShardStats:
        """The inverse of `pack`."""
        return cls(*packed.unbind(-1))


def combine_shards(stacked: ShardStats) -> ShardStats:
    """The statistics of all shards' columns together: [shards, N] -> [N]."""
    largest = stacked.max.amax(dim=0)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    gap = stacked.max - shift
    scale = gap.exp()
    sum_exp_logit = None
    if stacked.sum_exp_logit is not None:
        gap = gap.masked_fill(stacked.max == -torch.inf, 0.0)
        sum_exp_logit = (scale * (stacked.sum_exp_logit + gap * stacked.sum_exp)).sum(dim=0)
    sum_exp = (stacked.sum_exp * scale).sum(dim=0)
    return ShardStats(largest, sum_exp, stacked.target_logit.amax(dim=0), sum_exp_logit)


def merge_shards(stacked: ShardStats) -> tuple[Tensor, Tensor, Tensor | None]:
    """log_prob, log_sum_exp and entropy, each [N] in nats, of findings [shards, N]; entropy as in the findings.

    A target that no shard has gets log-prob -inf; a token with a NaN or +inf logit, or none above -inf, NaN.
    """
    whole = combine_shards(stacked)
    log_sum = whole.sum_exp.log()
    entropy = None
    if whole.sum_exp_logit is not None:
        entropy = log_sum - whole.sum_exp_logit / whole.sum_exp
    return whole.target_logit - whole.max - log_sum, whole.max + log_sum, entropy


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What logits and their sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _stats_of(logits: Tensor, targets: Tensor, first_column: int, entropy: bool) -> ShardStats:
    """Statistics of logits [N, V > 0], which are overwritten; `first_column` is the id of their first."""
    column = targets - first_column
    here = (column >= 0) & (column < logits.shape[1])
    target_logit = logits.gather(1, column.where(here, 0)[:, None])[:, 0].where(here, -torch.inf)
    largest = logits.amax(dim=1)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    exp = logits.sub_(shift[:, None]).exp_()
    sum_exp_logit = torch.special.xlogy(exp, exp).sum(dim=1) if entropy else None
    return ShardStats(largest, exp.sum(dim=1), target_logit, sum_exp_logit)


def _dlogits_of(
    logits: Tensor, targets: Tensor, first_column: int, log_sum_exp: Tensor, grad: Tensor
) -> Tensor:
    """grad * (onehot - softmax) in the place of the logits [N, V]; zero for ignored targets."""
    column = targets - first_column
    here = (column >= 0) & (column < logits.shape[1])
    dlogits = logits.sub_(log_sum_exp[:, None]).exp_().neg_()
    dlogits.scatter_add_(1, column.where(here, 0)[:, None], here.to(logits.dtype)[:, None])
    return dlogits.mul_(grad[:, None]).masked_fill_((targets == IGNORED)[:, None], 0.0)


def stats_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int, entropy: bool
) -> ShardStats:
    """The definition, in plain torch: all logits at once. Every row of `weight` is a token."""
    logits = hidden.to(_wide(hidden.dtype)) @ weight.to(_wide(weight.dtype)).T
    return _stats_of(logits, targets, vocab_start, entropy)


def gradients_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, log_sum_exp: Tensor, grad: Tensor, vocab_start: int
) -> tuple[Tensor, Tensor]:
    """The definition of d hidden [N, H] and d weight [V, H], in plain torch: all logits at once."""
    wide_hidden, wide_weight = hidden.to(_wide(hidden.dtype)), weight.to(_wide(weight.dtype))
    dlogits = _dlogits_of(wide_hidden @ wide_weight.T, targets, vocab_start, log_sum_exp, grad)
    return (dlogits @ wide_weight).to(hidden.dtype), (dlogits.T @ wide_hidden).to(weight.dtype)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _tile_shape(num_columns: int) -> tuple[int, int]:
    """Tokens and columns of a tile of "chunked"."""
    columns = min(num_columns, TILE_COLUMNS)
    return max(1, TILE_ELEMENTS // columns), columns


def stats_chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int, entropy: bool
) -> ShardStats:
    """`stats_reference`, one tile of the logits at a time."""
    dtype = _wide(hidden.dtype)
    tile_rows, tile_columns = _tile_shape(weight.shape[0])
    blocks = []
    for rows in _slices(hidden.shape[0], tile_rows):
        wide_hidden = hidden[rows].to(dtype)
        tiles = []
        for columns in _slices(weight.shape[0], tile_columns):
            logits, first = wide_hidden @ weight[columns].to(dtype).T, vocab_start + columns.start
            tiles.append(_stats_of(logits, targets[rows], first, entropy).pack())
            del logits  # before the next tile's
        blocks.append(combine_shards(ShardStats.unpack(torch.stack(tiles))).pack())
    return ShardStats.unpack(torch.cat(blocks))


def gradients_chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, log_sum_exp: Tensor, grad: Tensor, vocab_start: int
) -> tuple[Tensor, Tensor]:
    """`gradients_reference`, one tile of the logits at a time."""
    dtype = _wide(hidden.dtype)
    tile_rows, tile_columns = _tile_shape(weight.shape[0])
    d_hidden = torch.zeros_like(hidden, dtype=dtype)
    d_weight = torch.empty_like(weight)
    for columns in _slices(weight.shape[0], tile_columns):
        wide_weight = weight[columns].to(dtype)
        d_columns = torch.zeros_like(wide_weight)
        for rows in _slices(hidden.shape[0], tile_rows):
            wide_hidden, first = hidden[rows].to(dtype), vocab_start + columns.start
            logits = wide_hidden @ wide_weight.T
            dlogits = _dlogits_of(logits, targets[rows], first, log_sum_exp[rows], grad[rows])
            d_hidden[rows].addmm_(dlogits, wide_weight)
            d_columns.addmm_(dlogits.T, wide_hidden)
            del logits, dlogits  # one tensor; before the next tile's
        d_weight[columns] = d_columns
    return d_hidden.to(hidden.dtype), d_weight


def _stats_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int, entropy: bool
) -> ShardStats:
    return combine_shards(ShardStats(*fused.launch_stats(hidden, weight, targets, vocab_start, entropy)))


_STATS = {
    "reference": stats_reference,
    "chunked": stats_chunked,
    "triton": _stats_triton,
    "library": _stats_triton,
}
_GRADIENTS = {
    "reference": gradients_reference,
    "chunked": gradients_chunked,
    "triton": launch_gradients,
    "library": launch_gradients_library,
}


def _resolve(impl: str | None, hidden: Tensor) -> str:
    """The implementation to run: by default "triton" on CUDA but for float64, else "chunked"."""
    if impl is None and (not uses_triton(hidden) or hidden.dtype == torch.float64):
        impl = "chunked"
    allowed = ("reference", "chunked", "triton", "library")
    if resolve_impl("triton" if impl == "library" else impl, hidden, allowed) != "triton":
        return str(impl)
    if hidden.dtype == torch.float64:
        raise ValueError(f"impl={impl or 'triton'!r} has no float64: pass impl='reference' or 'chunked'")
    return impl or "triton"


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.shape[1:] != weight.shape[1:] or hidden.ndim != 2 or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {hidden.dtype} {list(hidden.shape)} and weight {weight.dtype} {list(weight.shape)} "
            "must be [N, H] and [V, H] of one dtype"
        )
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets is {targets.dtype} {list(targets.shape)}: it must be int64 [{hidden.shape[0]}], "
            "one a token"
        )


def shard_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    true_vocab_size: int | None = None,
    entropy: bool = False,
    impl: LogProbImpl | None = None,
) -> ShardStats:
    """This shard's part of the log-probs, float32 (float64 for float64), without gradient.

    Arguments and errors of `logprob_head`. `merge_shards` makes log-probs of all shards' statistics.
    """
    _check(hidden, weight, targets)
    stats = _STATS[_resolve(impl, hidden)]
    weight = weight[: _num_true_columns(weight.shape[0], vocab_start, true_vocab_size)]
    if weight.shape[0] == 0 or hidden.shape[0] == 0:
        zeros = torch.zeros(hidden.shape[0], dtype=_wide(hidden.dtype), device=hidden.device)
        lowest = torch.full_like(zeros, -torch.inf)
        return ShardStats(lowest, zeros, lowest, zeros if entropy else None)
    return stats(hidden, weight, targets, vocab_start, entropy)


def shard_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    grad: Tensor,
    *,
    vocab_start: int = 0,
    true_vocab_size: int | None = None,
    impl: LogProbImpl | None = None,
) -> tuple[Tensor, Tensor]:
    """d hidden [N, H], this shard's share of a sum over shards, and d weight [V, H], in the inputs' dtype.

    log_sum_exp: [N] of all shards, from `merge_shards`; grad: [N], gradient of the log-probs.
    """
    _check(hidden, weight, targets)
    gradients = _GRADIENTS[_resolve(impl, hidden)]
    num_columns = _num_true_columns(weight.shape[0], vocab_start, true_vocab_size)
    if num_columns == 0 or hidden.shape[0] == 0:
        return torch.zeros_like(hidden), torch.zeros_like(weight)
    grad = grad.to(log_sum_exp.dtype)
    d_hidden, d_weight = gradients(hidden, weight[:num_columns], targets, log_sum_exp, grad, vocab_start)
    padding = weight.shape[0] - num_columns
    return d_hidden, F.pad(d_weight, (0, 0, 0, padding)) if padding else d_weight


@dataclass(frozen=True)
class _Options:
    shard: dict[str, Any]
    """Keyword arguments of `shard_stats` and `shard_gradients`."""
    entropy: bool
    gather: Gather | None


class _LogProbHead(torch.autograd.Function):
    """Keeps hidden, weight, targets and log-sum-exp [N] for the backward pass: no tensor of N * V."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        found = shard_stats(hidden, weight, targets, entropy=options.entropy, **options.shard).pack()
        stacked = found[None] if options.gather is None else options.gather(found)
        log_prob, log_sum_exp, entropy = merge_shards(ShardStats.unpack(stacked))
        ctx.save_for_backward(hidden, weight, targets, log_sum_exp)
        ctx.shard = options.shard
        ignored = targets == IGNORED
        if entropy is not None:
            entropy.masked_fill_(ignored, 0.0)
            ctx.mark_non_differentiable(entropy)
        return log_prob.masked_fill_(ignored, 0.0), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, log_sum_exp = ctx.saved_tensors
        return *shard_gradients(hidden, weight, targets, log_sum_exp, grad, **ctx.shard), None, None


@overload
def logprob_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: Literal[True], vocab_start: int = 0,
    true_vocab_size: int | None = None, gather: Gather | None = None, impl: LogProbImpl | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def logprob_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: Literal[False] = False, vocab_start: int = 0,
    true_vocab_size: int | None = None, gather: Gather | None = None, impl: LogProbImpl | None = None,
) -> Tensor: ...  # fmt: skip
def logprob_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: bool = False,
    vocab_start: int = 0,
    true_vocab_size: int | None = None,
    gather: Gather | None = None,
    impl: LogProbImpl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each token's target under softmax(hidden @ weight.T), float32 [N] in nats, differentiable.

    hidden: [N, H]; weight: [V, H] of the same dtype, this shard's rows of the output head. bfloat16 or float32;
        "reference" and "chunked" also take float64, and give it. Gradients of float16 may underflow.
    targets: int64 [N], global ids. -100 is ignored: log-prob (and entropy) 0, no gradient.
    entropy: also return the entropy of each token's distribution, [N] in nats, without gradient.
    vocab_start: global id of weight's first row.
    true_vocab_size: global number of true tokens; rows of weight from it on are padding of probability 0.
    gather: collects float tensors [N, F] of all shards as [shards, N, F]; None for one shard.
    impl: "reference" makes all logits at once; "chunked" (the default without CUDA) a tile of 2^20 logits, and
        for 16-bit inputs d hidden in float32; "triton" (the default on CUDA) is the fused kernel; "library" is the
        same but for the backward pass' two sums, which are the vendor's matrix products.

    With shards, d hidden is this shard's share: the caller sums it over the shards, as the backward of Megatron's
    `copy_to_tensor_model_parallel_region` does; d weight is whole. A NaN or +inf among a token's logits makes its
    log-prob NaN; a target outside the vocabulary makes it -inf. The hidden state of an ignored token must be
    finite too, or d weight is not. Raises ValueError on shapes, dtypes or an `impl` that do not fit.
    """
    shard = {"vocab_start": vocab_start, "true_vocab_size": true_vocab_size, "impl": impl}
    log_prob, entropies = _LogProbHead.apply(hidden, weight, targets, _Options(shard, entropy, gather))  # pyright: ignore
    return (log_prob, entropies) if entropy else log_prob


def compile_cases() -> list[CompileCase]:
    """The configurations to check for sm_90."""
    return fused.compile_cases()
