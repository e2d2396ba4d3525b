"""Drawing tokens from hidden states with the policy's head, over tensor-parallel vocabulary shards."""

from __future__ import annotations

import torch
from torch import Tensor

from sip_engine.distributed.mesh import Axis
from sip_engine.kernels.exact import exact_linear
from sip_engine.kernels.filtered_sample import filtered_sample
from sip_engine.kernels.sample import ShardSample, finish_sample, merge_shards, sample
from sip_engine.policy.weights import PolicyWeights
from sip_engine.sampler.requests import SamplingParams


class TokenDraw:
    """The last stage's half of sampling: hidden states in, token ids and log-probs out.

    Shards exchange 20 bytes a row; only top-k and top-p gather logits.
    """

    def __init__(self, weights: PolicyWeights, tp: Axis, *, exact: bool = False) -> None:
        """`exact` draws from logits whose bits depend on the row only, and gathers them, too."""
        assert weights.head is not None, "only the last pipeline stage draws tokens"
        self.head, self.weights, self.tp, self.exact = weights.head, weights, tp, exact

    def __call__(
        self, hidden: Tensor, keys: Tensor, positions: Tensor, params: SamplingParams
    ) -> tuple[Tensor, Tensor]:
        """hidden [B, H], keys and positions [B] int64 -> ids [B] int64, log-probs [B] float32."""
        if params.filters or self.exact:
            shard = exact_linear(hidden, self.head) if self.exact else _logits(hidden, self.head)
            logits = self.tp.stack(shard).transpose(0, 1).flatten(1)  # [B, vocabulary]
            found = filtered_sample(
                logits,
                keys,
                positions,
                temperature=0.0 if params.greedy else params.temperature,
                top_k=params.top_k or None,
                top_p=params.top_p,
                vocab_size=self.weights.vocab_size,
            )
            return finish_sample(found)
        found = sample(
            hidden,
            self.head,
            keys,
            positions,
            temperature=0.0 if params.greedy else params.temperature,
            vocab_start=self.weights.vocab_start,
            vocab_size=self.weights.vocab_size,
        )
        if self.tp.size == 1:
            return finish_sample(found)
        return merge_shards(ShardSample.unpack(self.tp.stack(found.pack())))


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """[B, H] and [V, H] -> [B, V] float32: rounded to 16 bits they would be off by up to 1/16 and more."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return hidden.float() @ head.T.float()
