"""How keys and values lie in memory: the pages' shape, dtypes and checks, and their plain-torch gather.

One layer: k_pages, v_pages [num_pages, page_size, H_kv, D] in bfloat16, float16, float32 (float64 for the
references), or float8_e4m3fn with one float32 scale a KV head: value = stored * scale[head]. Another layout begins
here; kv_write and store_qkv write pages, prefill_attention, decode_attention and _attend read them.

Why not [num_pages, H_kv, page_size, D], or pages of 64: nothing that can be known without a GPU speaks for them.
Either way a token of a head is one run of 2 D bytes, 256 at D = 128: whole lines of memory, none fetched in vain, and
the heads beside it are read by the programs beside. The same kernels compiled for sm_90 (`compile_report`, Triton
3.7.1, bf16, D = 128, H_kv = 8, R = 1) take the same registers, shared memory, blocks and predicted time:

    registers, token-major / head-major      page 16       page 64
    decode, prefix, 16 rows                  96 / 96       156 / 152
    decode, suffix                           92 / 92       92 / 92
    prefill, 128 rows                        167 / 167     167 / 167

A program reads a page number, 4 bytes, for 2 * page_size * D elements: 1 byte in 2,048 at pages of 16. On average
half a page of each prefix and suffix stays empty: of a prefix of 1024 tokens 0.8 % at 16 and 3 % at 64, of a reply of
50 tokens 14 % and 39 %. `sampler.page_size` sets the size. A TMA descriptor takes either layout, as a box of
[page_size, 1, D] or [1, page_size, D]; it wants a box for every page, so pages of at least a tile of keys. Compiled
so, the kernels gain nothing: benchmarks/gpu/README.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def page_shape(num_pages: int, page_size: int, kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """Shape of one layer's keys, and of its values."""
    return num_pages, page_size, kv_heads, head_dim


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """`scale`, or the usual 1 / sqrt(head_dim)."""
    return 1.0 / math.sqrt(head_dim) if scale is None else scale


def check_dense(**tensors: Tensor) -> None:
    """Raise ValueError unless the last dim of every tensor is contiguous."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: the last must be 1, call .contiguous()")


def check_integers(dtype: torch.dtype, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has this dtype and a contiguous last dim."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    check_dense(**tensors)


def check_shapes(**shapes: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise ValueError unless every tensor has the shape given beside it."""
    for name, (tensor, expected) in shapes.items():
        if tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_pages(k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Raise ValueError unless the pages are contiguous twins and have scales exactly if they are float8."""
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            f"k_pages {tuple(k_pages.shape)} {k_pages.dtype} and v_pages {tuple(v_pages.shape)} "
            f"{v_pages.dtype} must share one shape [num_pages, page_size, H_kv, D] and one dtype"
        )
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError(f"pages must be contiguous, got strides {k_pages.stride()} and {v_pages.stride()}")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != (k_pages.dtype == FP8):
            given = "missing" if scale is None else "given"
            raise ValueError(
                f"{name} is {given} with pages of {k_pages.dtype}: pass it with {FP8} and only then"
            )
        if scale is not None and (scale.shape != k_pages.shape[2:3] or scale.dtype != torch.float32):
            raise ValueError(f"{name} is {tuple(scale.shape)} {scale.dtype}, expected [H_kv] float32")


def check_queries(q: Tensor, k_pages: Tensor) -> None:
    """Raise ValueError unless `q` [tokens, Hq, D] fits the pages and its heads share the KV heads evenly.

    Pages hold the dtype of `q`, or float8.
    """
    if q.ndim != 3 or q.shape[2] != k_pages.shape[3] or q.shape[1] % k_pages.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)} must be [tokens, Hq, D] with D and a multiple of H_kv from pages "
            f"[num_pages, page_size, H_kv, D] = {tuple(k_pages.shape)}"
        )
    if k_pages.dtype not in (q.dtype, FP8):
        raise ValueError(f"q is {q.dtype} but the pages are {k_pages.dtype}: they must be {q.dtype} or {FP8}")
    check_dense(q=q)


def gather_pages(
    pages: Tensor, table: Tensor, length: int, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The first `length` tokens of the pages in each row of `table` [..., MB], as `[..., length, H_kv, D]`.

    Entries of -1 read page 0: the caller must mask them.
    """
    num_blocks = -(-length // pages.shape[1])
    raw = pages.view(torch.uint8) if pages.dtype == FP8 else pages  # float8 has no index on the CPU
    tokens = raw[table[..., :num_blocks].long().clamp(min=0)].flatten(-4, -3)[..., :length, :, :]
    tokens = tokens.view(pages.dtype).to(dtype)
    return tokens if scale is None else tokens * scale[:, None]
