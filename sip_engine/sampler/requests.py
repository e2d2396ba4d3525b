"""What may be asked of the sampler, and the rules that are checked before any page is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sip_engine.kernels.random import sequence_key
from sip_engine.utils.errors import RequestError

MIN_TEMPERATURE = 1e-6
"""Dividing logits by less is greedy decoding in all but name, and loses their float32 precision."""


@dataclass(frozen=True)
class Request:
    """Ask for `n` completions of a prefix.

    Random numbers depend on (seed, step, document, rollout number, position) only, where position is
    `start` plus the token's number: not on the batch, its order, the wave or the number of processes.
    """

    prefix_ids: np.ndarray
    n: int
    document: int = 0
    start: int = 0


@dataclass(frozen=True)
class Completion:
    """Sampled ids (int32) and the policy's log-prob of each (float32, nats, at temperature 1, untruncated)."""

    ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; `greedy` takes the likeliest. `stop_ids` end a completion early, and are kept."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    seed: int = 0
    step: int = 0
    stop_ids: tuple[int, ...] = ()

    @property
    def filters(self) -> bool:
        """Whether tokens are cut off before drawing, which needs all logits of a row in one place."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0)


@dataclass(frozen=True)
class Limits:
    """What a request must fit into: the model's and the memory budget's."""

    max_context: int
    vocab_size: int
    num_pages: int
    page_size: int
    max_sequences: int

    def group_pages(self, prefix: int, n: int, suffix: int) -> int:
        """Pages of a group at full length: the prefix's, shared, and every rollout's own."""
        return -(-prefix // self.page_size) + n * -(-suffix // self.page_size)


def check_params(params: SamplingParams) -> None:
    """Raise RequestError for a parameter outside its range."""
    rules = (
        ("max_new_tokens", params.max_new_tokens, params.max_new_tokens >= 1, "1 or more"),
        (
            "temperature",
            params.temperature,
            MIN_TEMPERATURE <= params.temperature < float("inf"),
            f"finite and at least {MIN_TEMPERATURE:g} (or greedy)",
        ),
        ("top_p", params.top_p, 0.0 < params.top_p <= 1.0, "in (0, 1]"),
        ("top_k", params.top_k, params.top_k >= 0, "0 (keep all) or more"),
    )
    for name, value, holds, rule in rules:
        if not holds:
            raise RequestError(f"{name}={value}: must be {rule}")


def check_request(number: int, request: Request, params: SamplingParams, limits: Limits) -> None:
    """Raise RequestError if the request breaks a rule or can never fit."""
    ids = request.prefix_ids
    if len(ids) == 0:
        raise RequestError(f"request {number}: empty prompt; give at least one token (the BOS id will do)")
    if request.n < 1:
        raise RequestError(f"request {number}: n={request.n}, must be 1 or more")
    if len(ids) + params.max_new_tokens > limits.max_context:
        raise RequestError(
            f"request {number}: {len(ids)} prompt + {params.max_new_tokens} new tokens exceed the model's "
            f"context of {limits.max_context}; shorten the prompt or lower max_new_tokens"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limits.vocab_size:
        raise RequestError(
            f"request {number}: token id {low if low < 0 else high} is outside the vocabulary of "
            f"{limits.vocab_size}; encode the prompt with this model's tokenizer"
        )
    need = limits.group_pages(len(ids), request.n, params.max_new_tokens)
    if need > limits.num_pages or request.n > limits.max_sequences:
        raise RequestError(
            f"request {number}: {request.n} completions need {need} pages and {request.n} sequences, there are "
            f"{limits.num_pages} and {limits.max_sequences}; raise kv_memory_mb or max_sequences of the sampler, or "
            "ask for fewer completions"
        )


def random_keys(requests: Sequence[Request], params: SamplingParams) -> Tensor:
    """[B] int64, one random key a sequence, request after request."""
    documents = torch.tensor([r.document for r in requests for _ in range(r.n)])
    rollouts = torch.tensor([k for r in requests for k in range(r.n)])
    return sequence_key(params.seed, params.step, documents, rollouts)


def cut_at_stop(ids: np.ndarray, logprobs: np.ndarray, stop_ids: tuple[int, ...]) -> Completion:
    """A row of sampled tokens as a completion: up to and with the first stop token."""
    hits = np.flatnonzero(np.isin(ids, stop_ids))
    end = int(hits[0]) + 1 if len(hits) else len(ids)
    return Completion(ids[:end].astype(np.int32), logprobs[:end])
