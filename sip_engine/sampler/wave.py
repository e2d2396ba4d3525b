"""A wave: groups that are admitted together and decode a fixed number of tokens in step, without host work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sip_engine.kernels._transfer import upload
from sip_engine.sampler.attention import (
    AttentionImpl,
    DenseAttention,
    ExactAttention,
    KVPages,
    PagedAttention,
)
from sip_engine.sampler.decoder import Decoder
from sip_engine.sampler.draw import TokenDraw
from sip_engine.sampler.pages import WavePages
from sip_engine.sampler.prefill import prefill
from sip_engine.sampler.requests import Request, SamplingParams, random_keys
from sip_engine.sampler.step import DecodeSteps, StepShape, StepState


class Wave:
    """This pipeline stage's part of a wave. Use as a context manager: its pages go back at the end.

    B sequences sorted by group, P tokens of all prefixes together, H hidden, N new tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        draw: TokenDraw | None,
        pages: KVPages,
        impl: AttentionImpl,
        requests: Sequence[Request],
        params: SamplingParams,
        steps: DecodeSteps | None = None,
    ) -> None:
        """Take all pages of the wave. `draw` is None before the last stage. Raises OutOfPages.

        With `steps` tokens after the first are drawn by one of them, where this process holds every stage.
        """
        self.decoder, self.draw, self.params, self.steps = decoder, draw, params, steps
        device = decoder.weights.device
        prefix_lens = np.array([len(r.prefix_ids) for r in requests], np.int32)
        counts = np.array([r.n for r in requests], np.int32)
        self._held = WavePages(pages.pool)
        tables = self._held.admit(prefix_lens, counts, params.max_new_tokens)
        if impl == "dense":
            self.attention = DenseAttention(pages, tables, prefix_lens)
        else:
            exact = ExactAttention(pages, decoder.weights.max_context) if impl == "exact" else None
            self.attention = exact or PagedAttention(pages, "triton" if impl == "triton" else "reference")
            self.attention.set_prefill(tables.prefix_tables, prefix_lens)
            self.attention.set_decode(
                tables.prefix_tables, prefix_lens, tables.suffix_tables, tables.group_starts
            )
        group = tables.group_of_sequence.astype(np.int64)
        ends, lens = prefix_lens.cumsum(dtype=np.int64) - 1, prefix_lens.astype(np.int64)
        stream = np.concatenate([r.prefix_ids for r in requests]).astype(np.int64)
        self._tables, self._prefix_lens = tables, prefix_lens
        self._prefixes = [r.prefix_ids for r in requests]
        self._host_keys, self._host_positions = random_keys(requests, params), lens[group]
        self._host_starts = np.array([r.start for r in requests], np.int64)[group]
        self.stream = upload(stream, device)
        self.stream_positions = upload(np.concatenate([np.arange(n) for n in lens]), device)
        self.last_of_prefix = upload(ends[group], device)
        self.first_position = upload(self._host_positions, device)
        self.keys, self.starts = upload(self._host_keys, device), upload(self._host_starts, device)
        self.ids = torch.empty(len(group), params.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.empty(self.ids.shape, dtype=torch.float32, device=device)
        # Tokens drawn so far, on the device: positions and lengths follow it without waiting.
        self.drawn = torch.zeros(1, dtype=torch.int64, device=device)
        self.step = 0

    def __enter__(self) -> Wave:
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.release()

    def incoming_like(self) -> Tensor:
        """An empty tensor shaped like what `advance` takes next: token ids [B], or hidden states [P or B, H]."""
        w = self.decoder.weights
        if w.embedding is not None:
            return torch.empty(len(self.ids), dtype=torch.int64, device=w.device)
        rows = len(self.ids) if self.step else len(self.stream)
        return torch.empty(rows, w.hidden_size, dtype=w.dtype, device=w.device)

    def advance(self, incoming: Tensor | None) -> Tensor:
        """Prefill the prefixes, then one token a call.

        incoming: the ids drawn last on the first stage (None to prefill), the stage before's output on others.
        Returns the ids drawn [B] on the last stage, hidden states for the next one elsewhere.
        """
        if self.step == 0:
            inputs = self.stream if incoming is None else incoming
            hidden = self.decoder.forward(inputs, self.stream_positions, self.attention.prefill)
            out = hidden if self.draw is None else self._draw(self.draw, hidden[self.last_of_prefix])
        else:
            assert incoming is not None
            self.attention.begin_step(self.step - 1, self.drawn - 1)
            out = self._decode(incoming)
        self.drawn += 1
        self.step += 1
        return out

    def run(self) -> None:
        """Decode all tokens where this process holds every stage."""
        if self.steps is not None:
            self._run_steps(self.steps, self._prefill_in_parts(self.steps))
            return
        tokens = self.advance(None)
        for _ in range(1, self.params.max_new_tokens):
            tokens = self.advance(tokens)
            if self._all_stopped():
                break

    def _decode(self, incoming: Tensor) -> Tensor:
        positions = self.first_position + (self.drawn - 1)
        hidden = self.decoder.forward(incoming, positions, self.attention.decode)
        return hidden if self.draw is None else self._draw(self.draw, hidden)

    def _draw(self, draw: TokenDraw, hidden: Tensor) -> Tensor:
        ids, logprobs = draw(hidden, self.keys, self.starts + self.drawn, self.params)
        self.ids.index_copy_(1, self.drawn, ids[:, None])
        self.logprobs.index_copy_(1, self.drawn, logprobs[:, None])
        return ids

    def _prefill_in_parts(self, steps: DecodeSteps) -> Tensor:
        """The first token of every sequence [B]."""
        assert isinstance(self.attention, PagedAttention) and self.draw is not None
        last = prefill(
            self.decoder, self.attention, self._tables.prefix_tables, self._prefixes, steps.prefill_tokens
        )
        group = upload(self._tables.group_of_sequence.astype(np.int64), last.device)
        tokens = self._draw(self.draw, last.index_select(0, group))
        self.drawn += 1
        self.step += 1
        return tokens

    def _run_steps(self, steps: DecodeSteps, tokens: Tensor) -> None:
        """All tokens after the first, without any work on the host between them."""
        assert isinstance(self.attention, PagedAttention)
        num_steps, num_sequences = self.params.max_new_tokens - 1, len(self.ids)
        if num_steps == 0:
            return
        tables = self._tables
        shape = StepShape(
            sequences=num_sequences,
            groups=len(self._prefix_lens),
            prefix_blocks=tables.prefix_tables.shape[1],
            suffix_blocks=tables.suffix_tables.shape[1],
            history=num_steps,
            group_size=-(-num_sequences // len(self._prefix_lens)),
        )
        step = steps.at(shape, self.params)
        memory, state = StepState.on_host(step.shape)
        state.set_groups(tables.prefix_tables, self._prefix_lens, tables.group_starts)
        state.keys[:num_sequences] = self._host_keys
        state.positions[:num_sequences] = self._host_positions
        state.draw_positions[:num_sequences] = self._host_starts + 1
        state.suffix_tables[:num_sequences, : tables.suffix_tables.shape[1]] = tables.suffix_tables
        state.suffix_lens[:num_sequences] = 1
        step.load(memory, tokens, self.attention.scales)
        for _ in range(num_steps):
            step.run()
        drawn = step.history[:num_steps, :, :num_sequences].permute(1, 2, 0)  # [2, B, steps]
        self.ids[:, 1:] = drawn[0]
        self.logprobs[:, 1:] = drawn[1].contiguous().view(torch.float32)
        self.step = self.params.max_new_tokens

    def _all_stopped(self) -> bool:
        if (
            not self.params.stop_ids or self.step % 8
        ):  # looking costs a synchronisation: every 8 tokens will do
            return False
        stops = torch.tensor(self.params.stop_ids, device=self.ids.device)
        return bool(torch.isin(self.ids[:, : self.step], stops).any(dim=1).all())
