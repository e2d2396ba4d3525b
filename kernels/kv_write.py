"""Write new keys and values into the paged KV cache.

Shapes: N new tokens, H_kv KV heads, D head dim. For every token n with slots[n] >= 0:

    k_pages[slots[n] // page_size, slots[n] % page_size] = k[n]           (the same for v)

float8_e4m3fn pages store the value / scale[head], clamped to +-448 and rounded to nearest even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sip_engine.kernels._impl import resolve_impl
from sip_engine.kernels._triton import jit, tl, triton
from sip_engine.kernels.compile_report import CompileCase
from sip_engine.kernels.kv_layout import FP8, FP8_MAX, check_dense, check_integers, check_pages, check_shapes


def write_kv_reference(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """The definition, in plain torch. See `write_kv`."""
    keep = slots >= 0
    for new, pages, scale in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
        values = new[keep]
        if scale is not None:
            values = (values.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX)
        values, tokens = values.to(pages.dtype), pages.flatten(0, 1)
        if pages.dtype == FP8:  # float8 has no index_put on the CPU
            values, tokens = values.view(torch.uint8), tokens.view(torch.uint8)
        tokens[slots[keep]] = values


@jit
def _write_kernel(
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, slots_ptr, k_scale_ptr, v_scale_ptr,
    stride_kt, stride_kh, stride_vt, stride_vh,
    H_KV: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token: all heads of its key and of its value."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    head = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)[None, :]
    live = (head < H_KV)[:, None] & (d < D)
    k = tl.load(k_ptr + token * stride_kt + head[:, None] * stride_kh + d, mask=live, other=0.0)
    v = tl.load(v_ptr + token * stride_vt + head[:, None] * stride_vh + d, mask=live, other=0.0)
    if k_scale_ptr is not None:
        k_scale = tl.load(k_scale_ptr + head, mask=head < H_KV, other=1.0)[:, None]
        v_scale = tl.load(v_scale_ptr + head, mask=head < H_KV, other=1.0)[:, None]
        k = tl.clamp(tl.div_rn(k.to(tl.float32), k_scale), -448.0, 448.0, tl.PropagateNan.ALL)
        v = tl.clamp(tl.div_rn(v.to(tl.float32), v_scale), -448.0, 448.0, tl.PropagateNan.ALL)
    offsets = (slot * H_KV + head)[:, None] * D + d
    tl.store(k_pages_ptr + offsets, k.to(k_pages_ptr.dtype.element_ty), mask=live)
    tl.store(v_pages_ptr + offsets, v.to(v_pages_ptr.dtype.element_ty), mask=live)


def write_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Store `k`, `v` [N, H_kv, D] at `slots` [N] int64 of pages [num_pages, page_size, H_kv, D], in place.

    slot = page * page_size + offset; a slot below 0 is skipped. No slot may occur twice or lie past the last
    page: that is not checked, because it would wait for the device.
    `k_scale`, `v_scale` [H_kv] float32 are needed with float8_e4m3fn pages and refused with others.
    `impl`: "reference" or "triton"; by default triton on CUDA. ValueError when shapes or dtypes disagree.
    """
    check_pages(k_pages, v_pages, k_scale, v_scale)
    expected = (slots.numel(), *k_pages.shape[2:])
    check_shapes(k=(k, expected), v=(v, expected))
    check_dense(k=k, v=v)
    check_integers(torch.int64, slots=slots)
    if resolve_impl(impl, k, ("reference", "triton")) == "reference":
        write_kv_reference(k, v, k_pages, v_pages, slots, k_scale=k_scale, v_scale=v_scale)
    elif k.shape[0] > 0:
        num_tokens, num_heads, head_dim = k.shape
        _write_kernel[(num_tokens,)](
            k, v, k_pages, v_pages, slots, k_scale, v_scale,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            num_heads, head_dim, triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim),
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """bfloat16 and float8 pages with 16 heads of 128."""
    signature = {"k_ptr": "*bf16:16", "v_ptr": "*bf16:16", "slots_ptr": "*i64:16"}
    signature |= dict.fromkeys(("stride_kt", "stride_kh", "stride_vt", "stride_vh"), "i32:16")
    sizes = {"H_KV": 16, "D": 128, "BLOCK_H": 16, "BLOCK_D": 128}
    pages, scales = ("k_pages_ptr", "v_pages_ptr"), ("k_scale_ptr", "v_scale_ptr")
    bf16 = signature | dict.fromkeys(pages, "*bf16:16")
    fp8 = signature | dict.fromkeys(pages, "*fp8e4nv:16") | dict.fromkeys(scales, "*fp32:16")
    return [
        CompileCase("kv_write bf16 pages H=16 D=128", _write_kernel, bf16, sizes | dict.fromkeys(scales)),
        CompileCase("kv_write fp8e4nv pages H=16 D=128", _write_kernel, fp8, sizes),
    ]
