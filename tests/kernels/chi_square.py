"""Whether sampled token ids follow given probabilities: Pearson's chi-square statistic as a normal score."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chi_square_score(tokens: Tensor, probs: Tensor) -> float:
    """How many standard deviations the statistic of `tokens` [n] int64 lies above its mean under `probs` [V].

    Tokens expected fewer than 5 times share one cell; a token of probability 0 makes the score infinite.
    Standard normal (Wilson and Hilferty, 1931) if the tokens follow `probs`: above 4 once in 30,000 times.
    """
    counts = torch.bincount(tokens, minlength=probs.numel()).double()
    expected = probs.double() / probs.double().sum() * tokens.numel()
    if counts.numel() > expected.numel() or (counts[expected == 0] > 0).any():
        return math.inf
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = counts.numel() - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    width = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - width)) / math.sqrt(width)
