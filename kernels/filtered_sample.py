"""Sampling with top-k and top-p: the slow path, which needs all logits of a row in one place.

B: rows (sequences), V: vocabulary columns, T: temperature.

    kept  = the k largest logits, of which the fewest whose softmax(logits / T) sums to at least p
    token = argmax over kept of logits / T + g        with the Gumbel noise g of `sample`
"""

from __future__ import annotations

from torch import Tensor

from sip_engine.kernels import _cut_off
from sip_engine.kernels._cut_off import keep_mask
from sip_engine.kernels._impl import Impl
from sip_engine.kernels.compile_report import CompileCase
from sip_engine.kernels.random import check_counters
from sip_engine.kernels.sample import ShardSample, check_temperature, find_best, sample_from_logits


def filtered_sample(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl | None = None,
) -> ShardSample:
    """Sample a token a row from what top-k and top-p leave of softmax(logits / temperature).

    logits: [B, V] of the whole vocabulary, gathered from all shards; keys, positions: int64 [B].
    top_k: at least 1, or None for all; top_p: in (0, 1].
    vocab_size: number of true tokens; columns from it on are padding.
    impl: of the noise, and of finding what is kept where it is "triton"; every one keeps the same tokens.

    With nothing to cut off, or temperature 0, the token is that of `sample`. `max` and `sum_exp` are of all
    raw logits, so that `merge_shards` gives the log-prob without temperature and cutting off. NaN and
    infinite logits do what they do in `sample`. Raises ValueError on arguments out of range.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None to keep all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]; 1 keeps all")
    check_temperature(temperature)
    logits = logits[:, :vocab_size].float()
    num_columns = logits.shape[1]
    top_k = num_columns if top_k is None else top_k
    if temperature == 0 or (top_k >= num_columns and top_p == 1):
        return sample_from_logits(logits, keys, positions, temperature=temperature, impl=impl)
    check_counters(keys, positions, logits.shape[0])
    keep = keep_mask(logits, temperature, top_k, top_p, impl=impl)
    return find_best(logits, keys, positions, temperature, 0, impl, keep)


def compile_cases() -> list[CompileCase]:
    """The configurations to check for sm_90."""
    return _cut_off.compile_cases()
