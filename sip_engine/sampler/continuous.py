"""Continuous batching: sequences of varying length leave and enter at every step, and give way when pages run out.

The host runs one step behind the device: it plans and queues step n + 1 without knowing the tokens of step n,
which stay on the device, and reads those while step n + 1 runs. So nothing waits inside a step. A sequence that drew
a stop token is decoded once more in vain before it leaves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sip_engine.kernels._transfer import Read, upload
from sip_engine.sampler.attention import KVPages, PagedAttention
from sip_engine.sampler.decoder import Decoder
from sip_engine.sampler.draw import TokenDraw
from sip_engine.sampler.pages import RollingPages
from sip_engine.sampler.prefill import prefill
from sip_engine.sampler.requests import Completion, Limits, Request, SamplingParams, random_keys
from sip_engine.sampler.step import DecodeStep, DecodeSteps, StepShape, StepState


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
    steps: DecodeSteps | None = None,
) -> list[list[Completion]]:
    """Complete all requests; every completion ends at its first stop token or at `max_new_tokens`.

    A sequence that has to give way starts over later and draws the same tokens, because its random
    numbers depend on itself only. `preempt_every` forces that on half of the sequences every so many steps.
    `steps` are those of `decoder`, `draw`, `pages` and `impl`; without, they are not captured.
    """
    steps = steps or DecodeSteps(decoder, draw, pages, impl)
    batch = _Batch(steps, requests, params, limits)
    with batch.rows:
        while batch.waiting or batch.rows.num_live:
            batch.admit()
            batch.retire_and_make_room(
                preempt_every > 0 and batch.num_steps % preempt_every == preempt_every - 1
            )
            if batch.rows.num_live:
                batch.decode()
            batch.collect(keep=1 if batch.rows.num_live else 0)
        batch.collect(keep=0)
    return batch.results()


@dataclass
class _Drawn:
    """Tokens on their way to the host: the `columns`-th of each sequence."""

    sequences: np.ndarray
    columns: np.ndarray
    read: Read
    """[2, at least the sequences] int32: ids, and bits of log-probs."""


class _Batch:
    """All sequences (numbered request after request) and the rows of those being decoded."""

    def __init__(
        self, steps: DecodeSteps, requests: Sequence[Request], params: SamplingParams, limits: Limits
    ) -> None:
        self.steps, self.requests, self.params = steps, requests, params
        self.decoder, self.pool, self.limits = steps.decoder, steps.pages.pool, limits
        self.attention = PagedAttention(steps.pages, steps.impl)
        self.prefix_lens = np.array([len(r.prefix_ids) for r in requests], np.int32)
        counts = [r.n for r in requests]
        self.group_size = max(counts)
        self.rows = RollingPages(
            steps.pages.pool,
            max_sequences=limits.max_sequences,
            max_prefix_tokens=int(self.prefix_lens.max()),
            max_suffix_tokens=params.max_new_tokens,
        )
        self.request_of = np.repeat(np.arange(len(requests)), counts)
        self.keys = random_keys(requests, params).numpy()
        self.starts = np.array([r.start for r in requests])[self.request_of]
        self.ids = np.full((len(self.request_of), params.max_new_tokens), -1, np.int64)
        self.logprobs = np.zeros(self.ids.shape, np.float32)
        self.num_drawn = np.zeros(len(self.request_of), np.int64)
        """Tokens that the device was told to draw; what lies behind a stop token is void."""
        self.length = np.full(len(self.request_of), params.max_new_tokens)
        """Where each sequence ends, as far as the host has read."""
        numbers = np.split(np.arange(len(self.request_of)), np.cumsum(counts)[:-1])
        self.waiting: deque[np.ndarray] = deque(numbers)
        """Sequences of one request each, to be admitted together."""
        self.live = np.zeros(0, np.int64)
        """The sequence of each row."""
        self.tokens = torch.zeros(0, dtype=torch.int64, device=self.decoder.weights.device)
        """The token drawn last in each row."""
        self.step: DecodeStep | None = None
        """Where `tokens` and the state of the rows are, while no row has come or gone."""
        self.unread: deque[_Drawn] = deque()
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
        if groups:
            self._prefill(groups)

    def _prefill(self, groups: list[np.ndarray]) -> None:
        requests = [int(self.request_of[group[0]]) for group in groups]
        lens = self.prefix_lens[requests]
        self.rows.admit(lens, np.array([len(group) for group in groups], np.int32))
        new = slice(self.rows.num_groups - len(groups), self.rows.num_groups)
        prefixes = [self.requests[r].prefix_ids for r in requests]
        tables = self.rows.prefix_tables[new]
        last = prefill(self.decoder, self.attention, tables, prefixes, self.steps.prefill_tokens)
        entering = np.concatenate(groups)
        group = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        keys, positions = self._device(self.keys[entering]), self._device(self.starts[entering])
        hidden = last.index_select(0, self._device(group))
        ids, logprobs = self.steps.draw(hidden, keys, positions, self.params)
        self.tokens = torch.cat([self.tokens[: len(self.live)], ids])
        self.live, self.step = np.concatenate([self.live, entering]), None
        self._drew(entering, torch.stack([ids.to(torch.int32), logprobs.view(torch.int32)]))

    def retire_and_make_room(self, force: bool) -> None:
        """Drop finished sequences, and give each other one the slot of its newest token.

        Where pages are missing the last sequences to come start over; the first one never has to.
        """
        done = self.num_drawn[self.live] >= self.length[self.live]
        self.rows.finished[: len(self.live)] = done
        num_preempted = len(self.live) // 2 if force else 0
        while True:
            leaving = np.flatnonzero(~done)[1:][::-1][:num_preempted]
            self._send_back(self.live[leaving[::-1]])
            self.rows.finished[leaving] = True
            num_short = self.rows.step()
            stay = self.rows.source_rows[: self.rows.num_live]
            if len(stay) < len(self.live):
                self.tokens = self.tokens[: len(self.live)].index_select(0, self._device(stay))
                self.live, self.step = self.live[stay], None
            if num_short == 0:
                return
            num_preempted, done = num_short, np.zeros(len(self.live), bool)

    def decode(self) -> None:
        """Store the newest token of every live sequence and draw its next one."""
        live, lens = self.live, self.rows.suffix_lens[: len(self.live)]
        new_page = bool((lens % self.limits.page_size == 1).any()) or self.limits.page_size == 1
        if self.step is None or new_page:
            self._load(self.step)
        assert self.step is not None
        self.step.run()
        self._drew(live, self.step.history[0])
        self.num_steps += 1

    def collect(self, keep: int) -> None:
        """Read what was drawn, but for the newest `keep` draws."""
        while len(self.unread) > keep:
            drawn = self.unread.popleft()
            ids, bits = drawn.read.get()[:, : len(drawn.sequences)]
            self.ids[drawn.sequences, drawn.columns] = ids
            self.logprobs[drawn.sequences, drawn.columns] = bits.view(np.float32)
            stopped = np.isin(ids, self.params.stop_ids)
            ended, columns = drawn.sequences[stopped], drawn.columns[stopped]
            self.length[ended] = np.minimum(self.length[ended], columns + 1)

    def results(self) -> list[list[Completion]]:
        """Completions in the order of the requests."""
        done = [
            Completion(ids[:length].astype(np.int32), logprobs[:length])
            for ids, logprobs, length in zip(self.ids, self.logprobs, self.length, strict=True)
        ]
        edges = np.cumsum([0, *(r.n for r in self.requests)]).tolist()
        return [done[a:b] for a, b in pairwise(edges)]

    def _load(self, before: DecodeStep | None) -> None:
        """Give a step of the right shape all that the host knows of the rows, and the tokens."""
        rows, live = self.rows, self.live
        num_live, groups = len(live), slice(0, rows.num_groups)
        shape = StepShape(
            sequences=num_live,
            groups=rows.num_groups,
            prefix_blocks=rows.prefix_tables.shape[1],
            suffix_blocks=rows.suffix_tables.shape[1],
            history=1,
            group_size=self.group_size,
        )
        self.step = self.steps.at(shape, self.params)
        memory, state = StepState.on_host(self.step.shape)
        state.set_groups(rows.prefix_tables[groups], rows.prefix_lens[groups], rows.group_starts)
        drawn = self.num_drawn[live]
        state.keys[:num_live] = self.keys[live]
        state.positions[:num_live] = self.prefix_lens[self.request_of[live]] + drawn - 1
        state.draw_positions[:num_live] = self.starts[live] + drawn
        state.suffix_tables[:num_live, : rows.suffix_tables.shape[1]] = rows.suffix_tables[:num_live]
        state.suffix_lens[:num_live] = rows.suffix_lens[:num_live]
        self.step.load(memory, None if before is self.step else self.tokens, self.attention.scales)
        self.tokens = self.step.tokens

    def _drew(self, sequences: np.ndarray, drawn: Tensor) -> None:
        """The device was told to draw the next token of these sequences into `drawn`."""
        self.unread.append(_Drawn(sequences, self.num_drawn[sequences], Read(drawn)))
        self.num_drawn[sequences] += 1

    def _send_back(self, sequences: np.ndarray) -> None:
        """Let sequences wait for another start, those of one request together and the earliest first."""
        if not len(sequences):
            return
        self.collect(keep=0)  # what they drew is theirs; they will draw the same
        self.num_drawn[sequences] = 0
        requests = self.request_of[sequences]
        for request in np.unique(requests)[::-1]:
            self.waiting.appendleft(sequences[requests == request])

    def _device(self, array: np.ndarray) -> Tensor:
        return upload(np.asarray(array, np.int64), self.decoder.weights.device)
