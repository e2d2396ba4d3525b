"""The decode step: static buffers for a shape, one CUDA graph over them, and the cache of both by shape.

Shapes are rounded up, so that a few graphs serve batches of any size; the spare rows are empty. A graph is captured
once, by the second step of its shape (the first has compiled every kernel), and replayed for every later one, in any
wave or rolling batch: what changes between steps changes in the buffers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sip_engine.kernels._transfer import upload
from sip_engine.kernels.decode_attention import SPLIT
from sip_engine.kernels.decode_step import advance, next_slots
from sip_engine.sampler.attention import KVPages, PagedAttention
from sip_engine.sampler.decoder import Decoder
from sip_engine.sampler.draw import TokenDraw
from sip_engine.sampler.requests import SamplingParams
from sip_engine.utils.progress import console

MOST_SHAPES = 32
"""Shapes kept; the one that was used longest ago goes first."""


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step's buffers, and the usual number of sequences a group (which selects the kernel's tile)."""

    sequences: int
    groups: int
    prefix_blocks: int
    suffix_blocks: int
    history: int
    group_size: int

    def rounded(self, page_size: int) -> StepShape:
        """The next larger shape of a few; with a spare group for the spare sequences."""
        sequences = _round_up(self.sequences)
        split = max(1, SPLIT // page_size)  # a tile of the kernel: more blocks cost nothing
        return replace(
            self,
            sequences=sequences,
            groups=_round_up(self.groups + (sequences > self.sequences)),
            prefix_blocks=-(-self.prefix_blocks // split) * split,
            suffix_blocks=_round_up(self.suffix_blocks),
            history=_round_up(self.history),
            group_size=_round_up(self.group_size),
        )


def _round_up(number: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ..."""
    power = 1 << max(0, number - 1).bit_length()
    return power * 3 // 4 if number <= power * 3 // 4 else power


@dataclass
class StepState:
    """What a step reads and moves on: numpy arrays on the host, tensors on the device. B rows, G groups."""

    keys: Any
    """[B] int64, of random numbers"""
    positions: Any
    """[B] int64, of the token that is stored, in its context"""
    draw_positions: Any
    """[B] int64, of the token that is drawn, in its document"""
    counts: Any
    """[B] int64, steps since this state was loaded"""
    prefix_tables: Any
    """[G, prefix blocks] int32"""
    suffix_tables: Any
    """[B, suffix blocks] int32"""
    group_starts: Any
    """[G + 1] int32"""
    prefix_lens: Any
    """[G] int32"""
    suffix_lens: Any
    """[B] int32, with the token that is stored; 0 in an empty row"""

    @classmethod
    def over(cls, memory: Tensor, shape: StepShape) -> StepState:
        """The arrays of a shape, as views of one run of bytes."""
        arrays, offset = {}, 0
        for name, dtype, dims in _layout(shape):
            size = math.prod(dims) * dtype.itemsize
            arrays[name] = memory[offset : offset + size].view(dtype).view(dims)
            offset += -(-size // 16) * 16
        return cls(**arrays)

    @classmethod
    def on_host(cls, shape: StepShape) -> tuple[Tensor, StepState]:
        """The bytes, and numpy arrays over them in which every row is empty."""
        memory = torch.zeros(num_bytes(shape), dtype=torch.uint8)
        tensors = cls.over(memory, shape)
        state = cls(**{name: tensor.numpy() for name, tensor in vars(tensors).items()})
        state.prefix_tables.fill(-1)
        state.suffix_tables.fill(-1)
        return memory, state

    def set_groups(self, tables: np.ndarray, lens: np.ndarray, starts: np.ndarray) -> None:
        """Groups and their prefixes; spare sequences belong to an empty group behind them."""
        groups = len(lens)
        self.prefix_tables[:groups, : tables.shape[1]] = tables
        self.prefix_lens[:groups] = lens
        self.group_starts[: groups + 1] = starts
        self.group_starts[groups + 1 :] = len(self.keys)


def _layout(shape: StepShape) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    rows, groups = shape.sequences, shape.groups
    for name in ("keys", "positions", "draw_positions", "counts"):
        yield name, torch.int64, (rows,)
    yield "prefix_tables", torch.int32, (groups, shape.prefix_blocks)
    yield "suffix_tables", torch.int32, (rows, shape.suffix_blocks)
    yield "group_starts", torch.int32, (groups + 1,)
    yield "prefix_lens", torch.int32, (groups,)
    yield "suffix_lens", torch.int32, (rows,)


def num_bytes(shape: StepShape) -> int:
    """Bytes of a state; every array begins at a multiple of 16."""
    return sum(-(-math.prod(dims) * dtype.itemsize // 16) * 16 for _, dtype, dims in _layout(shape))


class DecodeStep:
    """Draws one token for every row of its buffers, a call; see the head of this file."""

    def __init__(self, shape: StepShape, steps: DecodeSteps, params: SamplingParams) -> None:
        self.shape, self._steps, self._params = shape, steps, params
        device = steps.decoder.weights.device
        self._memory = torch.zeros(num_bytes(shape), dtype=torch.uint8, device=device)
        state = self.state = StepState.over(self._memory, shape)
        self.tokens = torch.zeros(shape.sequences, dtype=torch.int64, device=device)
        """[B], drawn last: stored by the next step."""
        self.history = torch.zeros(shape.history, 2, shape.sequences, dtype=torch.int32, device=device)
        """[steps, (id, bits of the log-prob), B]"""
        self._slots = torch.zeros(shape.sequences, dtype=torch.int64, device=device)
        self.attention = PagedAttention(steps.pages, steps.impl)
        self.attention.group_size = shape.group_size
        self.attention.prefix_tables, self.attention.prefix_lens = state.prefix_tables, state.prefix_lens
        self.attention.suffix_tables, self.attention.suffix_lens = state.suffix_tables, state.suffix_lens
        self.attention.group_starts, self.attention.decode_slots = state.group_starts, self._slots
        self._graph: Any = None
        self._num_runs = 0

    def load(self, memory: Tensor, tokens: Tensor | None, scales: Tensor | None) -> None:
        """Take a state filled on the host, the tokens to begin with (None: those drawn last) and FP8 scales."""
        self._memory.copy_(upload(memory, self._memory.device))
        if tokens is not None:
            self.tokens[: len(tokens)].copy_(tokens)
        if scales is not None:
            self.attention.take_scales(scales)

    def forget_graph(self) -> None:
        """The next run captures it anew."""
        self._graph = None

    def run(self) -> None:
        """Store the tokens, draw the next ones, move on."""
        self._num_runs += 1
        if self._graph is None and self._num_runs > 1 and self._steps.captures:
            self._graph = self._steps.capture(self._run)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()

    def _run(self) -> None:
        state = self.state
        next_slots(
            state.suffix_tables,
            state.suffix_lens,
            self._steps.pages.page_size,
            out=self._slots,
            impl=self._steps.impl,
        )
        hidden = self._steps.decoder.forward(self.tokens, state.positions, self.attention.decode)
        ids, logprobs = self._steps.draw(hidden, state.keys, state.draw_positions, self._params)
        advance(
            ids,
            logprobs,
            self.tokens,
            state.positions,
            state.draw_positions,
            state.suffix_lens,
            state.counts,
            self.history,
            impl=self._steps.impl,
        )


class DecodeSteps:
    """The steps of one sampler's pages, by shape and by how tokens are drawn."""

    def __init__(
        self,
        decoder: Decoder,
        draw: TokenDraw,
        pages: KVPages,
        impl: Literal["reference", "triton"],
        *,
        graphs: bool = False,
        prefill_tokens: int = 16384,
    ) -> None:
        """`graphs` captures steps on CUDA; the reference kernels ask the host, and are not captured.

        Whoever uses the steps prefills `prefill_tokens` at a time.
        """
        self.prefill_tokens = prefill_tokens
        self.decoder, self.draw, self.pages = decoder, draw, pages
        self.impl: Literal["reference", "triton"] = impl
        self.on_cuda = decoder.weights.device.type == "cuda"
        self.captures = graphs and self.on_cuda and impl == "triton"
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None
        self._steps: OrderedDict[tuple, DecodeStep] = OrderedDict()
        self._addresses = pages.addresses

    def follow_pages(self) -> None:
        """To be called when pages may have come back: graphs that know other addresses are captured anew.

        Looking is exact and costs the host some comparisons. Pages at fixed addresses would need memory mapped beside
        torch's allocator.
        """
        if self.pages.addresses != self._addresses:
            self._addresses = self.pages.addresses
            for step in self._steps.values():
                step.forget_graph()

    def at(self, shape: StepShape, params: SamplingParams) -> DecodeStep:
        """The step whose buffers hold at least `shape`."""
        if self.on_cuda:
            shape = shape.rounded(self.pages.page_size)
        drawing = (params.greedy, params.temperature, params.top_k, params.top_p)
        step = self._steps.pop((shape, drawing), None) or DecodeStep(shape, self, params)
        self._steps[shape, drawing] = step
        if len(self._steps) > (MOST_SHAPES if self.on_cuda else 1):
            self._steps.popitem(last=False)
        return step

    def capture(self, run: Any) -> Any:
        """A graph of `run`, which is not executed; None if CUDA refuses, said once, and steps go on without.

        On a stream of its own and without `torch.cuda.graph`, which would wait for the device and give every cached
        block back.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream), _captured(graph, self._pool):
                run()
        except RuntimeError as error:
            self.captures = False
            console.print(
                "[yellow]notice:[/] the decode step cannot be captured as a CUDA graph "
                f"({str(error).splitlines()[0]}); going on without, slower: "
                'sampler.cuda_graph = "off" does so at once',
                markup=True,
                soft_wrap=True,
            )
            return None
        torch.cuda.current_stream().wait_stream(stream)
        return graph


@contextmanager
def _captured(graph: Any, pool: Any) -> Iterator[None]:
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # what was captured is void, and CUDA says so once more
            graph.capture_end()
        raise
    graph.capture_end()
