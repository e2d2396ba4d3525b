"""The sampler: prefixes in, completions with log-probs out, decoded in waves from the policy's own weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sip_engine.config import SamplerConfig
from sip_engine.errors import RequestError
from sip_engine.kernels.filtered_sample import filtered_sample
from sip_engine.kernels.random import sequence_key
from sip_engine.kernels.sample import ShardSample, merge_shards, sample
from sip_engine.mesh import Axis
from sip_engine.policy.weights import PolicyWeights
from sip_engine.sampler.cache import AttentionImpl, DenseAttention, KVPages, PagedAttention, page_bytes
from sip_engine.sampler.decoder import Decoder
from sip_engine.sampler.pages import WavePages, WaveTables


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
    """How tokens are drawn. `stop_ids` end a completion early (the stop token is kept)."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    step: int = 0
    stop_ids: tuple[int, ...] = ()


class Sampler:
    """Samples from weight views inside the trainer's process group; KV pages live for one wave only."""

    def __init__(
        self, weights: PolicyWeights, tp: Axis, cfg: SamplerConfig, *, impl: AttentionImpl | None = None
    ) -> None:
        self.weights, self.tp, self.cfg = weights, tp, cfg
        self.impl: AttentionImpl = impl or ("triton" if weights.embedding.is_cuda else "dense")
        self.decoder = Decoder(weights, tp)
        num_pages = cfg.kv_memory_mb * 2**20 // page_bytes(weights, cfg.page_size)
        self.num_pages = num_pages
        self._pages: KVPages | None = None  # allocated by the first wave

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """`n` completions for each request, in order. Every process of a tensor-parallel group gets the same.

        Raises:
            RequestError: a request or a parameter breaks a rule; nothing has been allocated then.
        """
        self.check(requests, params)
        results: list[list[Completion]] = [[] for _ in requests]
        for wave in self._waves(requests, params.max_new_tokens):
            for index, completions in zip(
                wave, self._run_wave([requests[i] for i in wave], params), strict=True
            ):
                results[index] = completions
        return results

    def check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        """Raise the RequestError that `generate` would raise."""
        check_params(params)
        for number, request in enumerate(requests):
            self._check_request(number, request, params)

    @property
    def pages_in_use(self) -> int:
        return 0 if self._pages is None else self._pages.pool.allocator.num_used

    def _check_request(self, number: int, request: Request, params: SamplingParams) -> None:
        ids, w = request.prefix_ids, self.weights
        if len(ids) == 0:
            raise RequestError(
                f"request {number}: empty prompt; give at least one token (the BOS id will do)"
            )
        if request.n < 1:
            raise RequestError(f"request {number}: n={request.n}, must be 1 or more")
        if len(ids) + params.max_new_tokens > w.max_context:
            raise RequestError(
                f"request {number}: {len(ids)} prompt + {params.max_new_tokens} new tokens exceed the model's "
                f"context of {w.max_context}; shorten the prompt or lower max_new_tokens"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= w.vocab_size:
            raise RequestError(
                f"request {number}: token id {low if low < 0 else high} is outside the vocabulary of "
                f"{w.vocab_size}; encode the prompt with this model's tokenizer"
            )
        need = self._group_pages(len(ids), request.n, params.max_new_tokens)
        if need > self.num_pages or request.n > self.cfg.max_sequences:
            raise RequestError(
                f"request {number}: {request.n} completions need {need} pages and {request.n} sequences, there are "
                f"{self.num_pages} and {self.cfg.max_sequences}; raise sampler.kv_memory_mb or "
                "sampler.max_sequences, or ask for fewer completions"
            )

    def _group_pages(self, prefix: int, n: int, suffix: int) -> int:
        size = self.cfg.page_size
        return -(-prefix // size) + n * -(-suffix // size)

    def _waves(self, requests: Sequence[Request], suffix: int) -> Iterator[list[int]]:
        """Request numbers of each wave: equal group sizes together, as many as pages and sequences allow."""
        order = sorted(range(len(requests)), key=lambda i: (requests[i].n, len(requests[i].prefix_ids), i))
        wave: list[int] = []
        pages = sequences = 0
        for i in order:
            n = requests[i].n
            need = self._group_pages(len(requests[i].prefix_ids), n, suffix)
            full = pages + need > self.num_pages or sequences + n > self.cfg.max_sequences
            if wave and (full or n != requests[wave[0]].n):
                yield wave
                wave, pages, sequences = [], 0, 0
            wave.append(i)
            pages, sequences = pages + need, sequences + n
        if wave:
            yield wave

    @torch.no_grad()
    def _run_wave(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        if self._pages is None:
            self._pages = KVPages(self.weights, self.num_pages, self.cfg.page_size)
        pages = self._pages
        prefix_lens = np.array([len(r.prefix_ids) for r in requests], np.int32)
        counts = np.array([r.n for r in requests], np.int32)
        with WavePages(pages.pool) as wave:
            tables = wave.admit(prefix_lens, counts, params.max_new_tokens)
            attention = (
                DenseAttention(pages, tables, prefix_lens)
                if self.impl == "dense"
                else PagedAttention(pages, tables, prefix_lens, self.impl)
            )
            ids, logprobs = self._decode(requests, tables, prefix_lens, attention, params)
        return _completions(ids.cpu().numpy(), logprobs.cpu().numpy(), counts, params.stop_ids)

    def _decode(
        self,
        requests: Sequence[Request],
        tables: WaveTables,
        prefix_lens: np.ndarray,
        attention: DenseAttention | PagedAttention,
        params: SamplingParams,
    ) -> tuple[Tensor, Tensor]:
        """Prefill each prefix once, then one token of every sequence a step -> ids, log-probs [B, new]."""
        device = self.weights.embedding.device
        group = torch.from_numpy(tables.group_of_sequence).long().to(device)
        lens = torch.from_numpy(prefix_lens).long().to(device)
        starts = torch.tensor([r.start for r in requests], device=device)[group]
        keys = _keys(requests, params).to(device)
        stream = np.concatenate([r.prefix_ids for r in requests]).astype(np.int64)
        positions = torch.cat([torch.arange(n) for n in prefix_lens.tolist()]).to(device)
        hidden = self.decoder.forward(torch.from_numpy(stream).to(device), positions, attention.prefill)
        hidden = hidden[lens.cumsum(0) - 1][group]
        ids = torch.empty(len(keys), params.max_new_tokens, dtype=torch.int64, device=device)
        logprobs = torch.empty(ids.shape, dtype=torch.float32, device=device)
        for step in range(params.max_new_tokens):
            ids[:, step], logprobs[:, step] = self._sample(hidden, keys, starts + step, params)
            if step + 1 == params.max_new_tokens or _all_stopped(ids[:, : step + 1], params.stop_ids):
                return ids[:, : step + 1], logprobs[:, : step + 1]
            attention.begin_step(step)
            hidden = self.decoder.forward(ids[:, step], lens[group] + step, attention.decode)
        raise AssertionError("max_new_tokens is positive")

    def _sample(
        self, hidden: Tensor, keys: Tensor, positions: Tensor, params: SamplingParams
    ) -> tuple[Tensor, Tensor]:
        w = self.weights
        if params.temperature > 0 and (params.top_k or params.top_p < 1.0):
            logits = self._gather_vocabulary(hidden @ w.head.T)
            found = filtered_sample(
                logits,
                keys,
                positions,
                temperature=params.temperature,
                top_k=params.top_k or None,
                top_p=params.top_p,
                vocab_size=w.vocab_size,
            )
            return merge_shards(ShardSample(*(part[None] for part in found)))
        found = sample(
            hidden,
            w.head,
            keys,
            positions,
            temperature=params.temperature,
            vocab_start=w.vocab_start,
            vocab_size=w.vocab_size,
        )
        return merge_shards(ShardSample(*(self._gather_shards(part) for part in found)))

    def _gather_shards(self, part: Tensor) -> Tensor:
        """[B] -> [shards, B]: all that tensor parallelism exchanges for a sampled token."""
        if self.tp.size == 1:
            return part[None]
        parts = [torch.empty_like(part) for _ in range(self.tp.size)]
        dist.all_gather(parts, part.contiguous(), group=self.tp.group)
        return torch.stack(parts)

    def _gather_vocabulary(self, logits: Tensor) -> Tensor:
        """[B, shard] -> [B, vocabulary]; only top-k and top-p need it."""
        if self.tp.size == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.tp.size)]
        dist.all_gather(parts, logits.contiguous(), group=self.tp.group)
        return torch.cat(parts, dim=1)


def check_params(params: SamplingParams) -> None:
    """Raise RequestError for a parameter outside its range."""
    rules = (
        ("max_new_tokens", params.max_new_tokens, params.max_new_tokens >= 1, "1 or more"),
        ("temperature", params.temperature, 0.0 <= params.temperature < float("inf"), "0 (greedy) or more"),
        ("top_p", params.top_p, 0.0 < params.top_p <= 1.0, "in (0, 1]"),
        ("top_k", params.top_k, params.top_k >= 0, "0 (keep all) or more"),
    )
    for name, value, holds, rule in rules:
        if not holds:
            raise RequestError(f"{name}={value}: must be {rule}")


def _keys(requests: Sequence[Request], params: SamplingParams) -> Tensor:
    """[B] int64, one random key a sequence."""
    documents = torch.tensor([r.document for r in requests for _ in range(r.n)])
    rollouts = torch.tensor([k for r in requests for k in range(r.n)])
    return sequence_key(params.seed, params.step, documents, rollouts)


def _all_stopped(ids: Tensor, stop_ids: tuple[int, ...]) -> bool:
    if not stop_ids or ids.shape[1] % 8:  # looking costs a synchronisation: every 8 tokens will do
        return False
    stopped = torch.isin(ids, torch.tensor(stop_ids, device=ids.device))
    return bool(stopped.any(dim=1).all())


def _completions(
    ids: np.ndarray, logprobs: np.ndarray, counts: np.ndarray, stop_ids: tuple[int, ...]
) -> list[list[Completion]]:
    rows = iter(zip(ids.astype(np.int32), logprobs, strict=True))

    def cut(row: np.ndarray, row_logprobs: np.ndarray) -> Completion:
        hits = np.flatnonzero(np.isin(row, stop_ids))
        end = int(hits[0]) + 1 if len(hits) else len(row)
        return Completion(row[:end], row_logprobs[:end])

    return [[cut(*next(rows)) for _ in range(n)] for n in counts.tolist()]
