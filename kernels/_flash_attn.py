"""flash-attn's variable-length kernels, forward and backward, of whichever line of the package imports.

Line 4 (`flash-attn-4`, for Hopper and Blackwell, compiled when first used) goes before line 2 (2.7 and 2.8, a build
of hours). Written against the low-level functions of 4.0.0b36, 2.7 and 2.8, of which the last two agree. They take
log-sum-exps from outside in the backward pass, which is what shared prefixes need. None of it has run on them, since
they need a GPU: the tests put plain-torch twins with the same parameters in their place.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

INSTALL = "install flash-attn-4 (4.0.0b36) or flash-attn 2.7 or 2.8, or use our own kernels"


@cache
def find_flash() -> tuple[int, ModuleType] | str:
    """The line, 4 or 2, and its module with the low-level functions; or why there is none."""
    try:
        from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]
    except ImportError as missing:
        reason = str(missing)
    else:
        if hasattr(interface, "_flash_attn_fwd") and hasattr(interface, "_flash_attn_bwd"):
            return 4, interface
        reason = "flash_attn.cute has no _flash_attn_fwd"
    try:
        import flash_attn  # pyright: ignore[reportMissingImports]
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]
    except ImportError:
        return f"flash-attn cannot be imported ({reason}): {INSTALL}"
    version = tuple(int(part) for part in flash_attn.__version__.split(".")[:2])
    if version not in ((2, 7), (2, 8)):
        return f"flash-attn {flash_attn.__version__} is not supported: {INSTALL}"
    return 2, flash_attn_interface


def flash_line() -> tuple[int, ModuleType]:
    """What `find_flash` found. ValueError if that is nothing."""
    found = find_flash()
    if isinstance(found, str):
        raise ValueError(found)
    return found


def why_not(head_dim: int, dtype: torch.dtype) -> str:
    """Why flash-attn cannot take such heads here; empty if it can."""
    found = find_flash()
    if isinstance(found, str):
        return found
    widest = 128 if found[0] == 4 else 256
    if dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > widest:
        return (
            f"flash-attn has no kernel for head dim {head_dim} in {dtype}: use a multiple of 8 up to {widest} in "
            "bfloat16 or float16, or our own kernels"
        )
    return ""


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [tokens, Hq, D] and natural log-sum-exps [Hq, tokens] float32.

    `cu`: int32 bounds of the sequences of queries and of keys; `longest`: of each.
    """
    line, module = flash_line()
    if line == 4:
        out, lse, *_ = module._flash_attn_fwd(
            q, k, v, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], max_seqlen_q=longest[0], max_seqlen_k=longest[1],
            softmax_scale=scale, causal=causal, return_lse=True,
        )  # fmt: skip
        return out, lse
    out, lse, *_ = module._flash_attn_varlen_forward(
        q, k, v, *cu, *longest, 0.0, scale, causal=causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return out, lse


def varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu: tuple[Tensor, Tensor], longest: tuple[int, int], causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of these sequences, from an output and log-sum-exps that may cover more keys."""
    line, module = flash_line()
    deterministic = torch.are_deterministic_algorithms_enabled()
    if line == 4:
        dq, dk, dv, *_ = module._flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1],
            max_seqlen_q=longest[0], max_seqlen_k=longest[1], deterministic=deterministic,
        )  # fmt: skip
        return dq, dk, dv
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    module._flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        *cu,
        *longest,
        0.0,
        scale,
        causal,
        -1,
        -1,
        0.0,
        None,
        deterministic,
    )
    return dq, dk, dv
