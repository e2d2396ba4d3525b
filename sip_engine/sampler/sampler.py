"""The sampler: prefixes in, completions with log-probs out, decoded from the policy's own weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property

import numpy as np
import torch

from sip_engine.accounting.memory import AUTO_SHARE
from sip_engine.config.schema import SamplerConfig
from sip_engine.distributed.agreement import stop_between
from sip_engine.distributed.mesh import Mesh
from sip_engine.kernels._impl import uses_triton
from sip_engine.policy.weights import PolicyWeights
from sip_engine.sampler.attention import AttentionImpl, KVPages, page_bytes
from sip_engine.sampler.continuous import decode_continuously
from sip_engine.sampler.decoder import Decoder
from sip_engine.sampler.draw import TokenDraw
from sip_engine.sampler.fp8_weights import Fp8Weights
from sip_engine.sampler.pipeline import run_pipelined
from sip_engine.sampler.requests import (
    Completion,
    Limits,
    Request,
    SamplingParams,
    check_params,
    check_request,
    cut_at_stop,
)
from sip_engine.sampler.step import DecodeSteps
from sip_engine.sampler.wave import Wave
from sip_engine.utils import heartbeat
from sip_engine.utils.errors import NonFiniteError

AUTO_MB_ON_CPU = 1024
"""kv_memory_mb="auto" without CUDA: MiB."""


class Sampler:
    """Samples from weight views inside the trainer's process group.

    Without stop tokens, and on the CPU, requests are decoded in waves: as many groups as pages and sequences
    allow, all of one length. With stop tokens on CUDA sequences leave and enter at every step.
    """

    def __init__(
        self, weights: PolicyWeights, mesh: Mesh, cfg: SamplerConfig, *, impl: AttentionImpl | None = None
    ) -> None:
        self.weights, self.mesh, self.cfg = weights, mesh, cfg
        self.kv_dtype = torch.float8_e4m3fn if cfg.kv_dtype == "fp8" else weights.dtype
        self.impl: AttentionImpl = impl or _default_impl(weights, cfg)
        exact = self.impl == "exact"
        follows = any(weights.fp8) and cfg.fp8_weights == "auto" and not exact
        self.fp8 = Fp8Weights(weights) if follows else None
        self.decoder = Decoder(weights, mesh.tp, exact=exact, fp8=self.fp8)
        self.draw = TokenDraw(weights, mesh.tp, exact=exact) if mesh.pp.is_last else None
        self._pages: KVPages | None = None  # allocated when first used
        self._steps: DecodeSteps | None = None

    @cached_property
    def limits(self) -> Limits:
        """What a request must fit into. With kv_memory_mb="auto" the memory free at the first look decides."""
        size = page_bytes(self.weights, self.cfg.page_size, self.kv_dtype)
        return Limits(
            self.weights.max_context,
            self.weights.vocab_size,
            self._kv_bytes() // size,
            self.cfg.page_size,
            self.cfg.max_sequences,
        )

    def _kv_bytes(self) -> int:
        if self.cfg.kv_memory_mb != "auto":
            return self.cfg.kv_memory_mb * 2**20
        if self.weights.device.type != "cuda":
            return AUTO_MB_ON_CPU * 2**20
        free, _ = torch.cuda.mem_get_info()
        free += (
            torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        )  # the allocator's own spare blocks
        # Processes of one replica decode the same waves.
        return self.mesh.least_in_replica(int(AUTO_SHARE * free))

    def give_back(self) -> None:
        """Free the pages where the settings leave their size to the sampler on CUDA. While nothing is drawn.

        They are taken again when tokens are drawn again. The steps stay, their buffers are small beside the pages;
        their graphs hold as long as the pages come back to the same addresses, and are captured anew otherwise.
        """
        if self.gives_back and self._pages is not None:
            self._pages.give_back()

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """`n` completions for each request, in order. Every process of a replica gets the same.

        Raises:
            RequestError: a request or a parameter breaks a rule; nothing has been allocated then.
            NonFiniteError: the policy gave logits that are not finite.
            Stopped: a signal asked the run to end; on every process of the replica, between two bundles.
        """
        self.check(requests, params)
        if self.fp8 is not None:
            self.fp8.refresh()
        if (
            params.stop_ids
            and self.draw is not None
            and self.impl in ("reference", "triton")
            and self.mesh.pp.size == 1
        ):
            with torch.no_grad():
                done = decode_continuously(
                    self.decoder,
                    self.draw,
                    self.pages,
                    self.impl,
                    requests,
                    params,
                    self.limits,
                    steps=self.steps,
                )
            _check_drawn(c.ids for group in done for c in group)
            return done
        results: list[list[Completion]] = [[] for _ in requests]
        for chosen in self._bundles(requests, params.max_new_tokens):
            done = self._complete([requests[i] for i in chosen], params)
            for index, completions in zip(chosen, done, strict=True):
                results[index] = completions
            heartbeat.tick()
            stop_between(self.mesh)
        return results

    def check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        """Raise the RequestError that `generate` would raise."""
        check_params(params)
        for number, request in enumerate(requests):
            check_request(number, request, params, self.limits)

    @property
    def kv_bytes_held(self) -> int:
        """Bytes of the pages, in use or not; 0 before they are first used and after `give_back`."""
        return 0 if self._pages is None else self._pages.num_bytes

    @property
    def gives_back(self) -> bool:
        """Whether the pages go and come with every step."""
        return self.cfg.kv_memory_mb == "auto" and self.weights.device.type == "cuda"

    @property
    def pages_in_use(self) -> int:
        return 0 if self._pages is None else self._pages.pool.allocator.num_used

    @property
    def pages(self) -> KVPages:
        if self._pages is None:
            self._pages = KVPages(self.weights, self.limits.num_pages, self.limits.page_size, self.kv_dtype)
        self._pages.take()
        return self._pages

    @property
    def steps(self) -> DecodeSteps | None:
        """Decode steps with their buffers and graphs; None where attention is not paged."""
        if self.draw is None or self.impl not in ("reference", "triton"):
            return None
        if self._steps is None:
            self._steps = DecodeSteps(
                self.decoder,
                self.draw,
                self.pages,
                self.impl,
                graphs=self.cfg.cuda_graph == "on",
                prefill_tokens=self.cfg.prefill_tokens,
            )
        self._steps.follow_pages()
        return self._steps

    def _wave_steps(self) -> DecodeSteps | None:
        """On one stage of CUDA; the CPU has no graphs, and there a step's spare rows would cost time."""
        on_cuda = self.weights.device.type == "cuda"
        return self.steps if on_cuda and self.mesh.pp.size == 1 else None

    def _bundles(self, requests: Sequence[Request], suffix: int) -> Iterator[list[int]]:
        """Numbers of the requests decoded together: equal group sizes, as many as pages and sequences allow."""
        order = sorted(range(len(requests)), key=lambda i: (requests[i].n, len(requests[i].prefix_ids), i))
        bundle: list[int] = []
        pages = sequences = 0
        for i in order:
            n = requests[i].n
            need = self.limits.group_pages(len(requests[i].prefix_ids), n, suffix)
            full = pages + need > self.limits.num_pages or sequences + n > self.limits.max_sequences
            if bundle and (full or n != requests[bundle[0]].n):
                yield bundle
                bundle, pages, sequences = [], 0, 0
            bundle.append(i)
            pages, sequences = pages + need, sequences + n
        if bundle:
            yield bundle

    @torch.no_grad()
    def _complete(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """Decode one bundle as a wave, or as one wave a pipeline stage."""
        num_waves = min(self.mesh.pp.size, len(requests))
        shares = [
            requests[i * len(requests) // num_waves : (i + 1) * len(requests) // num_waves]
            for i in range(num_waves)
        ]
        with ExitStack() as stack:
            waves = [
                stack.enter_context(
                    Wave(self.decoder, self.draw, self.pages, self.impl, share, params, self._wave_steps())
                )
                for share in shares
            ]
            if self.mesh.pp.size == 1:
                waves[0].run()
            else:
                run_pipelined(waves, params.max_new_tokens, self.mesh)
            num_drawn = waves[0].step
            ids = np.concatenate([wave.ids[:, :num_drawn].cpu().numpy() for wave in waves])
            logprobs = np.concatenate([wave.logprobs[:, :num_drawn].cpu().numpy() for wave in waves])
        _check_drawn(ids)
        rows = iter(zip(ids, logprobs, strict=True))
        return [[cut_at_stop(*next(rows), params.stop_ids) for _ in range(r.n)] for r in requests]


def _default_impl(weights: PolicyWeights, cfg: SamplerConfig) -> AttentionImpl:
    if cfg.batch_invariant:
        return "exact"
    if weights.device.type == "cuda":
        plain = weights.attention == "reference" or not uses_triton(weights.layers[0].qkv)
        return "reference" if plain else "triton"
    return "reference" if cfg.kv_dtype == "fp8" else "dense"


def _check_drawn(rows: Iterable[np.ndarray]) -> None:
    if any((ids < 0).any() for ids in rows):
        raise NonFiniteError(
            "the policy's logits are not finite, no token can be drawn; resume from an older checkpoint"
        )
