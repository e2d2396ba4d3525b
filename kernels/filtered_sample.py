"""Sampling with top-k and top-p: the slow path, which sorts the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from sip_engine.kernels.random import gumbel
from sip_engine.kernels.sample import ShardSample, sample_from_logits


def keep_mask(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """True [B, V] for the columns that top-k, then top-p, leave."""
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        kept[:, top_k:] = False
        ordered = ordered.masked_fill(~kept, -torch.inf)
    if top_p < 1.0:
        probs = torch.softmax(ordered / temperature, dim=1)
        kept &= probs.cumsum(dim=1) - probs < top_p
    return torch.zeros_like(kept).scatter_(1, order, kept)


def filtered_sample(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    vocab_size: int | None = None,
) -> ShardSample:
    """Sample one token a row from the filtered distribution."""
    logits = logits[:, :vocab_size].float()
    plain = sample_from_logits(logits, keys, positions, temperature=temperature, impl="reference")
    if temperature == 0.0:
        return plain
    columns = torch.arange(logits.shape[1], device=logits.device)
    perturbed = gumbel(keys, positions, columns).add_(logits, alpha=1.0 / temperature)
    perturbed.masked_fill_(~keep_mask(logits, temperature, top_k, top_p), -torch.inf)
    best = perturbed.argmax(dim=1, keepdim=True)
    return plain._replace(
        perturbed=perturbed.gather(1, best)[:, 0],
        token=torch.where(plain.token < 0, -1, best[:, 0]),
        logit=logits.gather(1, best)[:, 0],
    )
