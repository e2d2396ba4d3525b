"""The Triton kernels of attention over a packed stream as one differentiable operation, and their tuned tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sip_engine.kernels._attend import LOG2_E
from sip_engine.kernels._shared_prefix_kernels import dkv_kernel, dq_kernel, forward_kernel
from sip_engine.kernels._shared_prefix_layout import RowLayout
from sip_engine.kernels._tiles import Tile, tile_of, tiles_of
from sip_engine.kernels.compile_report import CompileCase


def _tile(kernel: str, q: Tensor) -> tuple[Tile, int]:
    """The tuned tile for `q` [T, Hq, D], and D padded to what the kernels hold."""
    block_d = 64 if q.shape[2] <= 64 else 128
    return tile_of(f"shared_prefix_{kernel}", q.element_size(), block_d), block_d


def _heads(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple:
    """The arguments that all kernels share: tokens, strides of k and v, base-2 scale, H_KV, R and D."""
    num_tokens, num_heads, head_dim = q.shape
    strides = (k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    return num_tokens, *strides, scale * LOG2_E, k.shape[1], num_heads // k.shape[1], head_dim


def _forward(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] in q's dtype and base-2 log-sum-exps [Hq, T] float32, of a contiguous q."""
    tile, block_d = _tile("forward", q)
    tiles = layout.query_tiles(tile.block_m)
    out = torch.empty_like(q)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    forward_kernel[(len(tiles) * q.shape[1],)](
        q, k, v, out, lse, tiles, layout.segment_start, *_heads(q, k, v, scale),
        tile.block_m, tile.block_n, block_d, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, layout: RowLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous and in q's dtype. q, out and dout must be contiguous."""
    tile, block_d = _tile("dq", q)
    tiles = layout.query_tiles(tile.block_m)
    dq = torch.empty_like(q)
    shift = torch.empty((2, *lse.shape), dtype=torch.float32, device=q.device)
    heads = _heads(q, k, v, scale)
    dq_kernel[(len(tiles) * q.shape[1],)](
        q, k, v, out, dout, dq, lse, shift, tiles, layout.segment_start, *heads,
        tile.block_m, tile.block_n, block_d, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tile, block_d = _tile("dkv", q)
    tiles = layout.key_tiles(tile.block_n)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    dkv_kernel[(len(tiles) * k.shape[1],)](
        q, k, v, dout, dk, dv, shift, tiles, layout.seen_until, *heads,
        tile.block_m, tile.block_n, block_d, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dq, dk, dv


class _SharedPrefixAttention(torch.autograd.Function):
    """The kernels as one differentiable operation; it keeps q, k, v, the output and 4 bytes a query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, scale: float) -> Tensor:
        q = q.contiguous()
        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        out, lse = _forward(q, k, v, layout, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        return *_backward(q, k, v, out, lse, dout.contiguous(), ctx.layout, ctx.scale), None, None


def shared_prefix_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, scale: float
) -> Tensor:
    """See `shared_prefix_attention`. Raises ValueError where no kernel exists."""
    if not 0 < q.shape[2] <= 128 or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"no Triton kernel for head dim {q.shape[2]} in {q.dtype}: use at most 128 in bfloat16, float16 or "
            "float32, or impl='reference'"
        )
    if scale <= 0:
        raise ValueError(f"scale={scale}: the Triton kernels need a positive one, or use impl='reference'")
    if layout.device.type != q.device.type:
        raise ValueError(f"the layout is on {layout.device} and q on {q.device}: build it for q's device")
    widest = max(q.shape[1] * q.shape[2], k.stride(0), v.stride(0))
    if max(layout.row_lens, default=0) * widest >= 2**31:
        raise ValueError(
            f"a row of {max(layout.row_lens)} tokens of {widest} elements is beyond 32-bit offsets: split it"
        )
    if q.numel() == 0:
        return torch.empty_like(q)
    return _SharedPrefixAttention.apply(q, k, v, layout, scale)  # pyright: ignore[reportReturnType]


def _case(name: str, kernel: Any, dtype: str, head_dim: int, tile: Tile) -> CompileCase:
    """8 KV heads of 3 query heads: a ratio that is no power of two takes the most registers."""
    tables = dict.fromkeys(("tiles_ptr", "segment_start_ptr", "seen_until_ptr"), "i32")
    pointers = tables | dict.fromkeys(("lse_ptr", "shift_ptr"), "fp32")
    constexprs = {"H_KV": 8, "R": 3, "D": head_dim}
    constexprs |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": head_dim}
    signature = {}
    for argument in kernel.arg_names:
        if argument.endswith("_ptr"):
            signature[argument] = f"*{pointers.get(argument, dtype)}:16"
        elif argument not in constexprs:
            integer = "i32:16" if argument.startswith("stride") else "i32"
            signature[argument] = "fp32" if argument == "scale" else integer
    return CompileCase(
        f"shared_prefix {name} {dtype} D={head_dim}",
        kernel, signature, constexprs, tile.num_warps, tile.num_stages, dtype != "fp32",
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Every tuned tile of every kernel."""
    kernels = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
    return [
        _case(name, kernel, "bf16" if size == 2 else "fp32", dim, tile)
        for name, kernel in kernels.items()
        for size in (2, 4)
        for (dim, _), tile in tiles_of(f"shared_prefix_{name}", size).items()
    ]
