"""Continuous batching: sequences of varying length leave and enter at every step, and give way when pages run out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sip_engine.sampler.attention import KVPages, PagedAttention
from sip_engine.sampler.decoder import Decoder
from sip_engine.sampler.draw import TokenDraw
from sip_engine.sampler.pages import RollingPages
from sip_engine.sampler.requests import Completion, Limits, Request, SamplingParams, random_keys


def decode_continuously(
    decoder: Decoder,
    draw: TokenDraw,
    pages: KVPages,
    impl: Literal["reference", "triton"],
    requests: Sequence[Request],
    params: SamplingParams,
    limits: Limits,
    *,
    preempt_every: int = 0,
) -> list[list[Completion]]:
    """Complete all requests; every completion ends at its first stop token or at `max_new_tokens`.

    A sequence that has to give way starts over later and draws the same tokens, because its random
    numbers depend on itself only. `preempt_every` forces that on half of the sequences every so many steps.
    """
    batch = _Batch(decoder, draw, pages, impl, requests, params, limits)
    with batch.rows:
        while batch.waiting or batch.rows.num_live:
            batch.admit()
            batch.retire_and_make_room(
                preempt_every > 0 and batch.num_steps % preempt_every == preempt_every - 1
            )
            if batch.rows.num_live:
                batch.decode()
    return batch.results()


class _Batch:
    """All sequences (numbered request after request) and the rows of those being decoded."""

    def __init__(
        self,
        decoder: Decoder,
        draw: TokenDraw,
        pages: KVPages,
        impl: Literal["reference", "triton"],
        requests: Sequence[Request],
        params: SamplingParams,
        limits: Limits,
    ) -> None:
        self.decoder, self.draw, self.requests, self.params = decoder, draw, requests, params
        self.pool, self.limits = pages.pool, limits
        self.attention = PagedAttention(pages, impl)
        self.prefix_lens = np.array([len(r.prefix_ids) for r in requests], np.int32)
        counts = [r.n for r in requests]
        self.rows = RollingPages(
            pages.pool,
            max_sequences=limits.max_sequences,
            max_prefix_tokens=int(self.prefix_lens.max()),
            max_suffix_tokens=params.max_new_tokens,
        )
        self.request_of = np.repeat(np.arange(len(requests)), counts)
        self.keys = random_keys(requests, params)
        self.starts = np.array([r.start for r in requests])[self.request_of]
        self.ids = np.full((len(self.request_of), params.max_new_tokens), -1, np.int64)
        self.logprobs = np.zeros(self.ids.shape, np.float32)
        self.num_drawn = np.zeros(len(self.request_of), np.int64)
        numbers = np.split(np.arange(len(self.request_of)), np.cumsum(counts)[:-1])
        self.waiting: deque[np.ndarray] = deque(numbers)
        """Sequences of one request each, to be admitted together."""
        self.live = np.zeros(0, np.int64)
        """The sequence of each row."""
        self.num_steps = 0

    def admit(self) -> None:
        """Take waiting groups while rows last and every sequence has a page to go on with; prefill them."""
        groups: list[np.ndarray] = []
        num_rows, free = self.rows.num_live, self.pool.allocator.num_free
        while self.waiting:
            group = self.waiting[0]
            prefix = int(self.prefix_lens[self.request_of[group[0]]])
            free -= -(-prefix // self.limits.page_size)
            num_rows += len(group)
            if num_rows > self.limits.max_sequences or free < num_rows:
                break
            groups.append(self.waiting.popleft())
        if not groups:
            return
        requests = [int(self.request_of[group[0]]) for group in groups]
        lens = self.prefix_lens[requests]
        self.rows.admit(lens, np.array([len(group) for group in groups], np.int32))
        new = slice(self.rows.num_groups - len(groups), self.rows.num_groups)
        self.attention.set_prefill(self.rows.prefix_tables[new], lens)
        stream = np.concatenate([self.requests[r].prefix_ids for r in requests]).astype(np.int64)
        positions = np.concatenate([np.arange(n) for n in lens])
        hidden = self.decoder.forward(self._device(stream), self._device(positions), self.attention.prefill)
        entering = np.concatenate(groups)
        last = np.repeat(lens.cumsum() - 1, [len(group) for group in groups])
        self.live = np.concatenate([self.live, entering])
        self._draw(hidden[self._device(last)], entering)

    def retire_and_make_room(self, force: bool) -> None:
        """Drop finished sequences, and give each other one the slot of its newest token.

        Where pages are missing the last sequences to come start over; the first one never has to.
        """
        tokens = self.ids[self.live, self.num_drawn[self.live] - 1]
        done = (self.num_drawn[self.live] == self.params.max_new_tokens) | np.isin(
            tokens, self.params.stop_ids
        )
        self.rows.finished[: len(self.live)] = done
        num_preempted = len(self.live) // 2 if force else 0
        while True:
            leaving = np.flatnonzero(~done)[1:][::-1][:num_preempted]
            self._send_back(self.live[leaving[::-1]])
            self.rows.finished[leaving] = True
            num_short = self.rows.step()
            self.live = self.live[self.rows.source_rows[: self.rows.num_live]]
            if num_short == 0:
                return
            num_preempted, done = num_short, np.zeros(len(self.live), bool)

    def decode(self) -> None:
        """Store the newest token of every live sequence and draw its next one."""
        rows, live = self.rows, self.live
        groups = slice(0, rows.num_groups)
        self.attention.set_decode(
            rows.prefix_tables[groups],
            rows.prefix_lens[groups],
            rows.suffix_tables[: len(live)],
            rows.group_starts,
        )
        self.attention.set_slots(rows.slots[: len(live)], rows.suffix_lens[: len(live)])
        tokens = self.ids[live, self.num_drawn[live] - 1]
        positions = self.prefix_lens[self.request_of[live]] + self.num_drawn[live] - 1
        hidden = self.decoder.forward(self._device(tokens), self._device(positions), self.attention.decode)
        self._draw(hidden, live)
        self.num_steps += 1

    def results(self) -> list[list[Completion]]:
        """Completions in the order of the requests."""
        done = [
            Completion(ids[:count].astype(np.int32), logprobs[:count])
            for ids, logprobs, count in zip(self.ids, self.logprobs, self.num_drawn, strict=True)
        ]
        edges = np.cumsum([0, *(r.n for r in self.requests)]).tolist()
        return [done[a:b] for a, b in pairwise(edges)]

    def _draw(self, hidden: Tensor, sequences: np.ndarray) -> None:
        drawn = self.num_drawn[sequences]
        keys = self.keys[torch.from_numpy(sequences)].to(hidden.device)
        ids, logprobs = self.draw(hidden, keys, self._device(self.starts[sequences] + drawn), self.params)
        self.ids[sequences, drawn] = ids.cpu().numpy()
        self.logprobs[sequences, drawn] = logprobs.cpu().numpy()
        self.num_drawn[sequences] += 1

    def _send_back(self, sequences: np.ndarray) -> None:
        """Let sequences wait for another start, those of one request together and the earliest first."""
        self.num_drawn[sequences] = 0
        requests = self.request_of[sequences]
        for request in np.unique(requests)[::-1]:
            self.waiting.appendleft(sequences[requests == request])

    def _device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(array)).long().to(self.decoder.weights.device)
