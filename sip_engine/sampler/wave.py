"""A wave: groups that are admitted together and decode a fixed number of tokens in step, without host work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

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
from sip_engine.sampler.requests import Request, SamplingParams, random_keys


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
    ) -> None:
        """Take all pages of the wave. `draw` is None before the last stage. Raises OutOfPages."""
        self.decoder, self.draw, self.params = decoder, draw, params
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
        group = torch.from_numpy(tables.group_of_sequence).long().to(device)
        lens = torch.from_numpy(prefix_lens).long().to(device)
        self.stream = torch.from_numpy(np.concatenate([r.prefix_ids for r in requests])).long().to(device)
        self.stream_positions = torch.cat([torch.arange(n) for n in prefix_lens.tolist()]).to(device)
        self.last_of_prefix = (lens.cumsum(0) - 1)[group]
        self.first_position = lens[group]
        self.keys = random_keys(requests, params).to(device)
        self.starts = torch.tensor([r.start for r in requests], device=device)[group]
        self.ids = torch.empty(len(group), params.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.empty(self.ids.shape, dtype=torch.float32, device=device)
        # Tokens drawn so far. On the device, so that a captured step can be replayed for every token.
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
        """Decode all tokens where this process holds every stage; with CUDA the steps are one captured graph."""
        tokens = self.advance(None)
        if self.ids.is_cuda and self.params.max_new_tokens > 3 and not self.decoder.exact:
            self._replay(self.advance(tokens))
            return
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

    def _replay(self, tokens: Tensor) -> None:
        """Capture one step (the steps before it have compiled every kernel) and replay it for the others.

        Nothing in the step depends on the host: positions, slots and lengths follow `drawn` on the device.
        """
        assert isinstance(self.attention, PagedAttention)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.attention.begin_step(self.step - 1, self.drawn - 1)
            tokens.copy_(self._decode(tokens))
            self.drawn += 1
        for _ in range(self.step, self.params.max_new_tokens):
            graph.replay()
        self.step = self.params.max_new_tokens

    def _all_stopped(self) -> bool:
        if (
            not self.params.stop_ids or self.step % 8
        ):  # looking costs a synchronisation: every 8 tokens will do
            return False
        stops = torch.tensor(self.params.stop_ids, device=self.ids.device)
        return bool(torch.isin(self.ids[:, : self.step], stops).any(dim=1).all())
