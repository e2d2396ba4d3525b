"""From the packed QKV projection to rotated queries and stored keys and values, in one pass.

N new tokens, G KV heads, R query heads a KV head, D head dim. A token's projection holds, KV head after KV head, its
R query heads, its key and its value (Megatron's order). Queries and keys may be normalised by their root mean square
(QK-norm, rounded to their dtype), are rotated as in `rotary`, and keys and values are stored as in `write_kv`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sip_engine.kernels._impl import Impl, resolve_impl
from sip_engine.kernels._triton import jit, tl, triton
from sip_engine.kernels.compile_report import CompileCase
from sip_engine.kernels.kv_layout import check_dense, check_integers, check_pages, check_shapes
from sip_engine.kernels.kv_write import write_kv_reference
from sip_engine.kernels.rotary import rotary_reference


def split_qkv(mixed: Tensor, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, G * (R + 2) * D] -> q [N, G * R, D], and views k and v [N, G, D]."""
    grouped = mixed.view(len(mixed), num_kv_heads, -1, head_dim)
    share = grouped.shape[2] - 2
    return grouped[:, :, :share].flatten(1, 2), grouped[:, :, share], grouped[:, :, share + 1]


def store_qkv_reference(
    mixed: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The definition, in plain torch. See `store_qkv`."""
    q, k, v = split_qkv(mixed, *k_pages.shape[2:])
    if q_norm is not None:
        q = torch.nn.functional.rms_norm(q, q.shape[-1:], q_norm, eps)
    if k_norm is not None:
        k = torch.nn.functional.rms_norm(k, k.shape[-1:], k_norm, eps)
    q, k = (rotary_reference(x, cos, sin, positions) for x in (q, k))
    write_kv_reference(k, v, k_pages, v_pages, slots, k_scale=k_scale, v_scale=v_scale)
    return q


@jit
def _store_kernel(
    mixed_ptr, cos_ptr, sin_ptr, positions_ptr, q_ptr, k_pages_ptr, v_pages_ptr, slots_ptr, q_norm_ptr, k_norm_ptr,
    k_scale_ptr, v_scale_ptr, mixed_stride, eps,
    H_KV: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token and KV head: R queries, a key and a value, each as two halves of D / 2."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    row = tl.arange(0, BLOCK_R)[:, None]  # R queries, the key, the value
    d = tl.arange(0, BLOCK_D)[None, :]
    live = (row < R + 2) & (d < HALF)
    source = mixed_ptr + token * mixed_stride + (head * (R + 2) + row) * D + d
    first = tl.load(source, mask=live, other=0.0)
    second = tl.load(source + HALF, mask=live, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    slot = tl.load(slots_ptr + token)

    stored = live & (row == R + 1) & (slot >= 0)
    at = (slot * H_KV + head) * D + d + row * 0
    v1, v2 = first, second
    if v_scale_ptr is not None:
        v_scale = tl.load(v_scale_ptr + head)
        v1 = tl.clamp(tl.div_rn(v1, v_scale), -448.0, 448.0, tl.PropagateNan.ALL)
        v2 = tl.clamp(tl.div_rn(v2, v_scale), -448.0, 448.0, tl.PropagateNan.ALL)
    tl.store(v_pages_ptr + at, v1.to(v_pages_ptr.dtype.element_ty), mask=stored)
    tl.store(v_pages_ptr + at + HALF, v2.to(v_pages_ptr.dtype.element_ty), mask=stored)

    if q_norm_ptr is not None:
        inverse = 1.0 / tl.sqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
        column = d < HALF
        q1 = tl.load(q_norm_ptr + d, mask=column, other=0.0).to(tl.float32)
        q2 = tl.load(q_norm_ptr + HALF + d, mask=column, other=0.0).to(tl.float32)
        k1 = tl.load(k_norm_ptr + d, mask=column, other=0.0).to(tl.float32)
        k2 = tl.load(k_norm_ptr + HALF + d, mask=column, other=0.0).to(tl.float32)
        first = (first * inverse * tl.where(row < R, q1, k1)).to(dtype).to(tl.float32)
        second = (second * inverse * tl.where(row < R, q2, k2)).to(dtype).to(tl.float32)

    angle = tl.load(positions_ptr + token) * HALF + d
    cos = tl.load(cos_ptr + angle, mask=d < HALF, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=d < HALF, other=0.0)
    rotated1 = first * cos - second * sin
    rotated2 = second * cos + first * sin

    queries = live & (row < R)
    target = q_ptr + (token * H_KV + head) * (R * D) + row * D + d
    tl.store(target, rotated1.to(dtype), mask=queries)
    tl.store(target + HALF, rotated2.to(dtype), mask=queries)

    stored = live & (row == R) & (slot >= 0)
    k1, k2 = rotated1.to(dtype).to(tl.float32), rotated2.to(dtype).to(tl.float32)
    if k_scale_ptr is not None:
        k_scale = tl.load(k_scale_ptr + head)
        k1 = tl.clamp(tl.div_rn(k1, k_scale), -448.0, 448.0, tl.PropagateNan.ALL)
        k2 = tl.clamp(tl.div_rn(k2, k_scale), -448.0, 448.0, tl.PropagateNan.ALL)
    tl.store(k_pages_ptr + at, k1.to(k_pages_ptr.dtype.element_ty), mask=stored)
    tl.store(k_pages_ptr + at + HALF, k2.to(k_pages_ptr.dtype.element_ty), mask=stored)


def store_qkv(
    mixed: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Rotated queries [N, G * R, D] of `mixed` [N, G * (R + 2) * D]; keys and values go to their pages, in place.

    cos, sin: float32 [M, D / 2]; positions, slots: int64 [N]; q_norm, k_norm: [D], both or neither. The rest is as in
    `rotary` and `write_kv`, and so is what is not checked because it would wait for the device. `impl`:
    "reference" or "triton"; by default triton on CUDA. ValueError when shapes or dtypes disagree.
    """
    check_pages(k_pages, v_pages, k_scale, v_scale)
    num_kv_heads, dim = k_pages.shape[2:]
    width = mixed.shape[-1]
    if mixed.ndim != 2 or width % (num_kv_heads * dim) or width < 3 * num_kv_heads * dim or dim % 2:
        raise ValueError(
            f"mixed {list(mixed.shape)} must be [N, G * (R + 2) * D] with the pages' G, {num_kv_heads}, and even "
            f"D, {dim}"
        )
    check_shapes(
        positions=(positions, mixed.shape[:1]),
        slots=(slots, mixed.shape[:1]),
        cos=(cos, (len(cos), dim // 2)),
        sin=(sin, tuple(cos.shape)),
    )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm go together: give both or neither")
    check_integers(torch.int64, positions=positions, slots=slots)
    check_dense(mixed=mixed)
    if resolve_impl(impl, mixed) == "reference":
        return store_qkv_reference(
            mixed, cos, sin, positions, k_pages, v_pages, slots,
            q_norm=q_norm, k_norm=k_norm, eps=eps, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    share = width // (num_kv_heads * dim) - 2
    q = torch.empty((len(mixed), num_kv_heads * share, dim), dtype=mixed.dtype, device=mixed.device)
    if len(mixed) > 0:
        _store_kernel[(len(mixed), num_kv_heads)](
            mixed, cos, sin, positions, q, k_pages, v_pages, slots, q_norm, k_norm, k_scale, v_scale,
            mixed.stride(0), eps, num_kv_heads, share, dim,
            triton.next_power_of_2(share + 2), triton.next_power_of_2(dim // 2),
        )  # fmt: skip
    return q


def compile_cases() -> list[CompileCase]:
    """bfloat16 and float8 pages, 8 KV heads of 128 with 2 query heads each; with and without QK-norm."""
    signature = dict.fromkeys(("mixed_ptr", "q_ptr"), "*bf16:16") | dict.fromkeys(
        ("cos_ptr", "sin_ptr"), "*fp32:16"
    )
    signature |= dict.fromkeys(("positions_ptr", "slots_ptr"), "*i64:16") | {
        "mixed_stride": "i32:16",
        "eps": "fp32",
    }
    sizes = {"H_KV": 8, "R": 2, "D": 128, "BLOCK_R": 4, "BLOCK_D": 64}
    pages, scales = ("k_pages_ptr", "v_pages_ptr"), ("k_scale_ptr", "v_scale_ptr")
    norms = ("q_norm_ptr", "k_norm_ptr")
    cases = []
    for name, dtype in (("bf16", "*bf16:16"), ("fp8e4nv", "*fp8e4nv:16")):
        for has_norm in (False, True):
            given, absent = signature | dict.fromkeys(pages, dtype), dict(sizes)
            for group, is_there, kind in (
                (scales, dtype != "*bf16:16", "*fp32:16"),
                (norms, has_norm, "*bf16:16"),
            ):
                if is_there:
                    given |= dict.fromkeys(group, kind)
                else:
                    absent |= dict.fromkeys(group)
            label = f"store_qkv {name} pages H=8 R=2 D=128{' QK-norm' if has_norm else ''}"
            cases.append(CompileCase(label, _store_kernel, given, absent))
    return cases
