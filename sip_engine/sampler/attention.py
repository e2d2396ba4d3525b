"""KV pages of all layers, and the attention of one wave over them."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sip_engine.kernels._impl import uses_triton
from sip_engine.kernels._transfer import upload
from sip_engine.kernels.attention_choice import Shape, choose_decode, choose_packed
from sip_engine.kernels.decode_attention import decode_attention
from sip_engine.kernels.decode_step import next_slots
from sip_engine.kernels.dense_decode_attention import dense_decode_attention
from sip_engine.kernels.exact import exact_attention
from sip_engine.kernels.kv_layout import FP8, FP8_MAX, page_shape
from sip_engine.kernels.kv_write import write_kv
from sip_engine.kernels.prefill_attention import prefill_attention
from sip_engine.kernels.shared_prefix_attention import RowLayout, shared_prefix_attention
from sip_engine.policy.weights import PolicyWeights
from sip_engine.sampler.decoder import Projected
from sip_engine.sampler.pages import PagePool, WaveTables
from sip_engine.utils.errors import RequestError

AttentionImpl = Literal["dense", "reference", "triton", "exact"]


class KVPages:
    """The paged key/value memory of every layer, and the pool that says who holds which page.

    keys, values: one a layer, shaped and typed as `kernels/kv_layout.py` says.
    """

    def __init__(self, weights: PolicyWeights, num_pages: int, page_size: int, dtype: torch.dtype) -> None:
        if num_pages >= 2**31:
            raise RequestError(f"{num_pages} KV pages are more than page numbers reach; lower kv_memory_mb")
        self.pool = PagePool(num_pages, page_size)
        self.shape = page_shape(num_pages, page_size, weights.num_local_kv_heads, weights.head_dim)
        self.page_size, self.dtype = page_size, dtype
        self.num_layers, self.device = len(weights.layers), weights.device
        self.attention = weights.attention
        self.is_fp8 = dtype is FP8
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.take()

    def take(self) -> None:
        """Allocate the memory, if it was given back.

        Each layer gets the address that it had before wherever the allocator hands out the same blocks: it does so
        when nothing made in between stays, since a freed block becomes whole again and no cached one is given to
        the driver.
        """
        if self.keys:
            return
        try:
            blocks = [_zeros(self.shape, self.dtype, self.device) for _ in range(2 * self.num_layers)]
        except (RuntimeError, MemoryError):  # CUDA; the CPU
            size = 2 * self.num_layers * math.prod(self.shape) * self.dtype.itemsize / 2**20
            raise RequestError(
                f"there is no memory for KV pages of {size:,.0f} MiB on {self.device}; lower kv_memory_mb"
            ) from None
        blocks.sort(key=lambda block: block.data_ptr())  # equal blocks come back in another order
        self.keys, self.values = blocks[0::2], blocks[1::2]

    def give_back(self) -> None:
        """Free the memory; what the pages held is lost."""
        assert self.pool.allocator.num_used == 0, "pages are in use"
        self.keys, self.values = [], []

    @property
    def num_bytes(self) -> int:
        """Memory held, used or not."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where each layer's memory begins: what a CUDA graph has written down."""
        return tuple(tensor.data_ptr() for tensor in (*self.keys, *self.values))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU memory that costs nothing before it is used, which `torch.zeros` would fill at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


def page_bytes(weights: PolicyWeights, page_size: int, dtype: torch.dtype) -> int:
    """Bytes one page takes over all layers, keys and values."""
    page = page_shape(1, page_size, weights.num_local_kv_heads, weights.head_dim)
    return 2 * len(weights.layers) * math.prod(page) * dtype.itemsize


def slots_of(pages: KVPages, tables: np.ndarray, begins: np.ndarray, lens: np.ndarray) -> Tensor:
    """[sum of lens] int64: the slots of lens[r] tokens of each table row from begins[r] on, row after row."""
    slots = np.empty(int(lens.sum()), np.int64)
    pages.pool.planner.fill_prefill_slots(tables, begins, lens, pages.page_size, slots)
    return upload(slots, pages.device)


class PagedAttention:
    """Attention through block tables: the kernels of `prefill_attention` and `decode_attention`.

    Whoever runs it sets the tables: those of the prefixes to prefill, and those of a decode step. With FP8
    pages each layer and head gets its scales from the first prefixes stored, with room for values twice as
    large to come; what is larger still saturates.
    """

    def __init__(self, pages: KVPages, impl: Literal["reference", "triton"]) -> None:
        self.pages = pages
        self.impl: Literal["reference", "triton"] = impl
        self.group_size = 16
        """The usual number of sequences a group."""
        self.scales: Tensor | None = None
        """[layers, 2, kv_heads] float32, of keys and of values; with FP8 pages only."""
        if pages.is_fp8:
            self.scales = torch.ones(
                pages.num_layers, 2, pages.shape[2], dtype=torch.float32, device=pages.device
            )
        self._scaled: set[int] = set()

    def take_scales(self, scales: Tensor) -> None:
        """Those of another attention over the same pages, into this one's memory."""
        assert self.scales is not None
        self.scales.copy_(scales)

    def _scales_of(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        if self.scales is None:
            return None, None
        return self.scales[layer, 0], self.scales[layer, 1]

    def set_prefill(self, tables: np.ndarray, lens: np.ndarray, begins: np.ndarray | None = None) -> None:
        """`lens` [groups] more tokens of prefixes are about to be stored in `tables` [groups, blocks].

        begins: [groups] how many of each prefix are stored already; None: none.
        """
        begins = np.zeros_like(lens) if begins is None else begins
        self.prefill_tables, self.prefill_lens = self._device(tables), self._device(begins + lens)
        self.prefill_starts = running_sums(self._device(lens))
        self.prefill_layout = RowLayout(tuple(lens.tolist()), ((),) * len(lens), self.pages.device)
        self.prefill_slots = slots_of(self.pages, tables, begins, lens)
        self._reads_whole_prefixes = not begins.any()

    def set_decode(
        self,
        prefix_tables: np.ndarray,
        prefix_lens: np.ndarray,
        suffix_tables: np.ndarray,
        group_starts: np.ndarray,
    ) -> None:
        """Groups and sequences, sorted by group, about to decode."""
        self.prefix_tables, self.prefix_lens = self._device(prefix_tables), self._device(prefix_lens)
        self.suffix_tables, self.group_starts = self._device(suffix_tables), self._device(group_starts)
        self.suffix_lens = torch.zeros(
            len(suffix_tables), dtype=torch.int32, device=self.suffix_tables.device
        )

    def begin_step(self, step: int, device_step: Tensor) -> None:
        """Suffix token `step` of every sequence of a wave is about to be stored and attended from.

        `device_step` [1] is the same number on the device; only it is read, so that nothing waits.
        """
        self.suffix_lens.copy_((device_step + 1).expand(len(self.suffix_lens)))
        self.decode_slots = next_slots(
            self.suffix_tables, self.suffix_lens, self.pages.page_size, impl=self.impl
        )

    def prefill(self, layer: int, projected: Projected) -> Tensor:
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        k_scale, v_scale = self._scales_of(layer)
        if k_scale is not None and v_scale is not None and layer not in self._scaled:
            _, k, v = projected.split()
            k_scale.copy_(_fp8_scale(k))
            v_scale.copy_(_fp8_scale(v))
            self._scaled.add(layer)
        if self._prefills_with_flash(projected):
            q, k, v = projected.split()
            write_kv(k, v, keys, values, self.prefill_slots, impl=self.impl)
            scale = q.shape[-1] ** -0.5
            return shared_prefix_attention(q, k, v, self.prefill_layout, scale=scale, impl="flash")
        q = projected.store(
            keys, values, self.prefill_slots, k_scale=k_scale, v_scale=v_scale, impl=self.impl
        )
        return prefill_attention(
            q,
            keys,
            values,
            self.prefill_tables,
            self.prefill_starts,
            self.prefill_lens,
            k_scale=k_scale,
            v_scale=v_scale,
            impl=self.impl,
        )

    def _prefills_with_flash(self, projected: Projected) -> bool:
        """flash-attn attends over whole prefixes as they are; float8 pages are read back, as decoding will."""
        if not self._reads_whole_prefixes:
            return False
        if self.impl == "reference" or self.pages.is_fp8 or self.pages.attention not in ("auto", "flash"):
            return False
        if self.pages.attention == "flash":
            return True
        weights = projected.weights
        q = projected.mixed.view(len(projected.mixed), -1, weights.head_dim)[:, : self._num_heads(weights)]
        return choose_packed("prefill", q, weights.num_local_kv_heads, self.prefill_layout) == "flash"

    @staticmethod
    def _num_heads(weights: PolicyWeights) -> int:
        return weights.num_local_kv_heads * (weights.num_heads // weights.num_kv_heads)

    def _decode_impl(self, head_dim: int, ratio: int) -> Literal["reference", "triton", "triton_ungrouped"]:
        if self.impl == "reference" or self.pages.attention == "triton":
            return self.impl
        prefix = self.prefix_tables.shape[1] * self.pages.page_size
        return choose_decode(Shape("decode", head_dim, ratio, self.group_size, prefix))

    def decode(self, layer: int, projected: Projected) -> Tensor:
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        k_scale, v_scale = self._scales_of(layer)
        q = projected.store(keys, values, self.decode_slots, k_scale=k_scale, v_scale=v_scale, impl=self.impl)
        return decode_attention(
            q,
            keys,
            values,
            self.group_starts,
            self.prefix_tables,
            self.prefix_lens,
            self.suffix_tables,
            self.suffix_lens,
            k_scale=k_scale,
            v_scale=v_scale,
            group_size=self.group_size,
            impl=self._decode_impl(q.shape[2], q.shape[1] // keys.shape[2]),
        )

    def _device(self, array: np.ndarray) -> Tensor:
        # A copy: the tables of a rolling batch change in place while the device still reads these.
        return upload(array, self.pages.device)


def _fp8_scale(x: Tensor) -> Tensor:
    """[tokens, heads, D] -> [heads] float32: what a stored 1.0 stands for."""
    return (x.float().abs().amax((0, 2)) * (2.0 / FP8_MAX)).clamp(min=1e-12)


def running_sums(lengths: Tensor) -> Tensor:
    """[n] -> [n + 1] int32 running sums from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


class DenseAttention:
    """The CPU's fast path over the same pages, for waves of equal group size.

    Prefill attends over the packed prefixes and stores them in their pages; each layer's prefixes are then
    laid contiguous once a wave. Suffix pages of a wave are one run, so that the suffix cache of all
    sequences is a strided view and a step writes and reads it without any index.
    """

    def __init__(self, pages: KVPages, tables: WaveTables, prefix_lens: np.ndarray) -> None:
        self.pages = pages
        self.layout = RowLayout(tuple(prefix_lens.tolist()), ((),) * len(prefix_lens))
        self.prefill_slots = slots_of(pages, tables.prefix_tables, np.zeros_like(prefix_lens), prefix_lens)
        self.prefix_tables = torch.from_numpy(tables.prefix_tables).long().clamp(min=0)
        longest = int(prefix_lens.max())
        inside = torch.arange(longest) < torch.from_numpy(prefix_lens)[:, None]
        ragged = int(prefix_lens.min()) != longest
        bias = torch.zeros(inside.shape, dtype=pages.keys[0].dtype).masked_fill(~inside, float("-inf"))
        self.bias = bias[:, None, None] if ragged else None
        self.longest = longest
        first = int(tables.suffix_tables[0, 0])
        num_sequences, blocks = tables.suffix_tables.shape
        run = first + torch.arange(num_sequences * blocks).view(num_sequences, blocks)
        assert bool((torch.from_numpy(tables.suffix_tables) == run).all()), "suffix pages are not one run"

        def suffix_view(pool: Tensor) -> Tensor:  # [B, blocks * page_size, kv_heads, D]
            part = pool[first : first + num_sequences * blocks]
            return part.view(num_sequences, blocks * pages.page_size, *pool.shape[2:])

        self.suffix_keys = [suffix_view(pool) for pool in pages.keys]
        self.suffix_values = [suffix_view(pool) for pool in pages.values]
        self.prefixes: dict[int, tuple[Tensor, Tensor]] = {}
        self.step = -1

    def prefill(self, layer: int, projected: Projected) -> Tensor:
        q, k, v = projected.split()
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        write_kv(k, v, keys, values, self.prefill_slots)
        self.prefixes[layer] = (self._contiguous(keys), self._contiguous(values))
        return shared_prefix_attention(q, k, v, self.layout, scale=q.shape[-1] ** -0.5)

    def begin_step(self, step: int, device_step: Tensor) -> None:
        """Suffix token `step` of every sequence is about to be stored and attended from."""
        self.step = step

    def decode(self, layer: int, projected: Projected) -> Tensor:
        q, k, v = projected.split()
        keys, values = self.suffix_keys[layer], self.suffix_values[layer]
        keys[:, self.step], values[:, self.step] = k, v
        seen = self.step + 1
        return dense_decode_attention(
            q,
            *self.prefixes[layer],
            self.bias,
            keys[:, :seen],
            values[:, :seen],
            scale=q.shape[-1] ** -0.5,
        )

    def _contiguous(self, pool: Tensor) -> Tensor:
        """[groups, kv_heads, longest prefix, D] of one layer's prefixes."""
        gathered = pool[self.prefix_tables].flatten(1, 2)[:, : self.longest]
        # Cells past a prefix' end are masked, but 0 * NaN is not 0: give them a finite value.
        if self.bias is not None:
            gathered = gathered.masked_fill(torch.isinf(self.bias[:, 0, 0, :, None, None]), 0.0)
        return gathered.transpose(1, 2).contiguous()


class ExactAttention(PagedAttention):
    """The same function with bits that depend on a sequence alone (see `exact_attention`); slow."""

    def __init__(self, pages: KVPages, max_context: int) -> None:
        super().__init__(pages, "triton" if uses_triton(pages.keys[0]) else "reference")
        self.max_context = max_context

    def prefill(self, layer: int, projected: Projected) -> Tensor:
        q, k, v = projected.split()
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        write_kv(k, v, keys, values, self.prefill_slots, impl=self.impl)
        lens = self.prefill_lens.tolist()
        parts = zip(q.split(lens), k.split(lens), v.split(lens), strict=True)
        return torch.cat([self._causal(*part) for part in parts])

    def decode(self, layer: int, projected: Projected) -> Tensor:
        q, k, v = projected.split()
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        write_kv(k, v, keys, values, self.decode_slots, impl=self.impl)
        group_of = torch.repeat_interleave(self.group_starts.diff().long())
        tables = torch.cat([self.prefix_tables[group_of], self.suffix_tables], 1).long().clamp(min=0)
        prefix_cells = self.prefix_tables.shape[1] * self.pages.page_size
        cell = torch.arange(tables.shape[1] * self.pages.page_size, device=q.device)
        inside = torch.where(
            cell < prefix_cells,
            cell < self.prefix_lens[group_of, None],
            cell - prefix_cells < self.suffix_lens[:, None],
        )
        gathered_k, gathered_v = (pool[tables].flatten(1, 2).transpose(1, 2) for pool in (keys, values))
        visible = inside[:, None, None]  # [B, 1, 1, cells]
        gathered_k, gathered_v = (
            x.masked_fill(~inside[:, None, :, None], 0.0) for x in (gathered_k, gathered_v)
        )
        heads = q.view(len(q), gathered_k.shape[1], -1, q.shape[-1])  # [B, kv_heads, R, D]
        return self._attend(heads, gathered_k, gathered_v, visible).reshape(q.shape)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One prefix: q [P, heads, D], k and v [P, kv_heads, D]."""
        length, num_kv_heads = k.shape[:2]
        heads = q.view(length, num_kv_heads, -1, q.shape[-1]).permute(1, 2, 0, 3)  # [kv_heads, R, P, D]
        visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        out = self._attend(heads, k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None], visible)
        return out.permute(2, 0, 1, 3).reshape(q.shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return exact_attention(q, k, v, visible, q.shape[-1] ** -0.5, max_keys=self.max_context)
