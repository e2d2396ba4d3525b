"""What tests of attention over pages share: poisoned pages, and attention of one query in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from interpreter import DEVICE
from torch import Tensor

from sip_engine.kernels._triton import triton

if DEVICE == "cpu" and triton.__version__.startswith("3.6."):
    # Its interpreter calls int() on arrays of one element where a loop has a bound from memory, which
    # numpy 2.5 refuses. Triton 3.7 does not.
    from triton.runtime import interpreter as triton_interpreter

    _patch_lang_tensor = triton_interpreter._patch_lang_tensor

    def _patch_lang_tensor_and_index(tensor: Any, scope: Any) -> None:
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    triton_interpreter._patch_lang_tensor = _patch_lang_tensor_and_index

# The interpreter multiplies the bits of bfloat16 numbers as integers.
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16

# In 16 bits the weights and the output are rounded once each, and |v| < 5.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.float16: 2 * 5 * 2**-11,
    torch.bfloat16: 2 * 5 * 2**-8,
}


@contextmanager
def poisoned_device() -> Iterator[None]:
    """Seed, choose the device, and fill every torch.empty with NaN: outputs and partials start poisoned."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def int32(values: Sequence) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def padded(tables: list[list[int]]) -> Tensor:
    """[len(tables), longest + 1] int32, padded with -1."""
    width = max(len(table) for table in tables) + 1
    return int32([table + [-1] * (width - len(table)) for table in tables])


class Pages:
    """Pages that are dealt in shuffled order, all NaN until a token is written."""

    def __init__(self, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
        self.k = torch.full((num_pages, page_size, num_kv_heads, head_dim), torch.nan).to(dtype)
        self.v = self.k.clone()
        self.free = torch.randperm(num_pages).tolist()

    def store(self, keys: Tensor, values: Tensor) -> list[int]:
        """Write [n, H_kv, D] each to new pages; returns their numbers."""
        page_size = self.k.shape[1]
        table = [self.free.pop() for _ in range(-(-len(keys) // page_size))]
        for token in range(len(keys)):
            self.k[table[token // page_size], token % page_size] = keys[token].to(self.k.dtype)
            self.v[table[token // page_size], token % page_size] = values[token].to(self.v.dtype)
        return table


def draw_kv(length: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Keys and values [2, length, H_kv, D] float64 that pages of `dtype` hold exactly."""
    return torch.randn(2, length, num_kv_heads, head_dim, dtype=torch.float64).to(dtype).double()


def attend_one(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """softmax(scale * q K^T) V of one query [Hq, D], float64, one head at a time; 0 without keys [n, H_kv, D]."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for head in range(q.shape[0] if len(keys) else 0):
        kv_head = head // (q.shape[0] // keys.shape[1])
        weights = (keys[:, kv_head] @ q[head].double() * scale).softmax(0)
        out[head] = weights @ values[:, kv_head]
    return out


def fp8_scales() -> dict[str, Tensor]:
    """Scales of two KV heads, far apart."""
    return {"k_scale": torch.tensor([0.03, 1.7]), "v_scale": torch.tensor([2.0, 0.011])}
