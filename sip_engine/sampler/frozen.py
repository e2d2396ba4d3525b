"""A checkpoint's policy that reads and writes text but does not learn: no optimizer, no gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sip_engine.config.schema import ParallelConfig, SamplerConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.megatron_cpu import megatron_device
from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.checkpoint import CheckpointState, checkpoint_tokenizer, load_weights, read_state
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.packing import PackedRows, pack_rows, split_by_tokens
from sip_engine.policy.rows import Row
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.draw import TokenDraw
from sip_engine.sampler.requests import SamplingParams
from sip_engine.sampler.sampler import Sampler
from sip_engine.utils.errors import RequestError

_MICRO_BATCH_TOKENS = 16384
_LOGITS_AT_A_TIME = 1 << 26  # the draw's reference has them all in memory


@dataclass(frozen=True)
class ScoredSuffix:
    """What the policy makes of one suffix."""

    logprobs: np.ndarray
    """[tokens] float32, nats, each given the prefix and the tokens before it."""
    is_greedy: bool | None = None
    """Whether every token is the likeliest one; None if it was not asked for."""


class FrozenPolicy:
    """One model copy over a tensor-parallel replica; the other processes hold further copies.

    It has no pipeline stages: beside a policy that has some it is laid over `Mesh.without_pipeline`.
    """

    def __init__(
        self,
        model: PolicyModel,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        micro_batch_tokens: int = _MICRO_BATCH_TOKENS,
    ) -> None:
        assert mesh.pp.size == 1, "a frozen policy has no pipeline stages"
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        self.micro_batch_tokens = micro_batch_tokens
        self.max_context = model.max_sequence_length
        self.weights = weight_views(model, model.true_vocab_size, mesh.tp.rank)

    @classmethod
    def load(cls, checkpoint: Path, mesh: Mesh) -> tuple[FrozenPolicy, CheckpointState]:
        """Load a checkpoint's weights into the mesh' layout.

        Raises:
            CheckpointError: it is damaged.
        """
        state, tokenizer = read_state(checkpoint), checkpoint_tokenizer(checkpoint)
        parallel = ParallelConfig(tensor=mesh.tp.size)
        model = build_model(state.model.without_fp8(), parallel, state.vocab_size, mesh, seed=0)
        load_weights(checkpoint, model, state.model, state.vocab_size)
        model.requires_grad_(False)
        return cls(model, tokenizer, mesh), state

    def sampler(self, cfg: SamplerConfig) -> Sampler:
        """A sampler that reads this policy's own weights."""
        return Sampler(self.weights, self.mesh, cfg)

    def micro_batches(self, rows: Sequence[Row]) -> list[PackedRows]:
        """Rows packed into micro-batches of at most the configured tokens, in order."""
        groups = split_by_tokens([row.num_tokens for row in rows], self.micro_batch_tokens)
        return [pack_rows([rows[i] for i in group], self.mesh.device) for group in groups]

    def score(self, batches: Sequence[PackedRows]) -> list[Tensor]:
        """Log-probs [num_targets] float32 of each micro-batch."""
        # Not by Megatron's schedule: it follows the policy's pipeline, which this model does not share.
        with torch.no_grad(), megatron_device():
            return [self.model(batch) for batch in batches]

    def score_rows(self, rows: Sequence[Row], *, greedy: bool = False) -> list[list[ScoredSuffix]]:
        """Each row's suffixes, scored; the prefix of a row is read once for all of them.

        `greedy` also finds out whether a suffix is what greedy decoding would write, by the sampler's own rule.
        """
        suffixes = []
        for batch in self.micro_batches(rows):
            values, likeliest = self._score_batch(batch, greedy)
            ends = np.cumsum(batch.target_lens)[:-1]
            hits = [None] * len(batch.target_lens)
            if likeliest is not None:
                hits = np.split((likeliest == batch.targets).cpu().numpy(), ends)
            for logprobs, hit in zip(np.split(values.cpu().numpy(), ends), hits, strict=True):
                suffixes.append(ScoredSuffix(logprobs, None if hit is None else bool(hit.all())))
        results, scored = [], iter(suffixes)
        for row in rows:
            results.append([next(scored) for _ in row.suffixes])
        return results

    def _score_batch(self, batch: PackedRows, greedy: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the targets and, if wanted, the likeliest token in the place of each: [num_targets]."""
        if not greedy:
            return self.score([batch])[0], None
        hidden: list[Tensor] = []
        handle = self.model.decoder.register_forward_hook(lambda *call: hidden.append(call[-1]))
        try:
            (values,) = self.score([batch])
        finally:
            handle.remove()
        scored = hidden[0][:, 0].index_select(0, batch.scored)
        draw, params = TokenDraw(self.weights, self.mesh.tp), SamplingParams(1, greedy=True)
        likeliest = []
        for part in scored.split(max(1, _LOGITS_AT_A_TIME // self.weights.vocab_size)):
            unused = torch.zeros(len(part), dtype=torch.int64, device=part.device)  # keys of random numbers
            likeliest.append(draw(part, unused, unused, params)[0])
        return values, torch.cat(likeliest)


def fit_prefix(prefix: np.ndarray, num_new: int, max_context: int, what: str) -> np.ndarray:
    """The last tokens of `prefix` that leave room for `num_new` more, at least one of them.

    Raises:
        RequestError: `num_new` tokens and one before them do not fit into the context.
    """
    room = max_context - num_new
    if room < 1:
        raise RequestError(
            f"{what}: {num_new} tokens and one before them exceed the model's context of {max_context}; shorten it"
        )
    return prefix[-room:]


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids [n > 0] int32 of a text as the model's own tokenizer begins it; nothing at all begins a document."""
    ids = np.concatenate((tokenizer.begin, tokenizer.encode(text))).astype(np.int32)
    return ids if len(ids) else np.array([tokenizer.bos_id], np.int32)


def encode_continuation(tokenizer: Tokenizer, context: str, continuation: str) -> np.ndarray:
    """Ids [n] int32 of a continuation as it would be read behind its context.

    Where the ids of both together begin with the context's own, the rest of them; else (a token would span
    the border) those of the continuation alone, so that the context's ids are the same for each continuation.
    """
    before, together = tokenizer.encode_batch([context, context + continuation], num_threads=1)
    if len(together) >= len(before) and np.array_equal(together[: len(before)], before):
        return together[len(before) :]
    return tokenizer.encode(continuation)
