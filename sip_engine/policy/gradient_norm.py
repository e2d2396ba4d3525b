"""The norm of all gradients, in Megatron's place where neither Transformer Engine nor Apex computes it: its own
fallback reads the norm of every parameter's gradient from the device, and waits for each.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from torch import Tensor


def use_one_norm() -> None:
    """Have Megatron clip gradients, from now on, by a norm that stays on the device."""
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm


def _norm(
    chunk_size: int, flag: Tensor, tensors: list[list[Tensor]], per_tensor: bool, *_: Any
) -> tuple[Tensor, None]:
    """[1] float32, with the signature of `amp_C.multi_tensor_l2norm`."""
    (gradients,) = tensors
    return torch.nn.utils.get_total_norm(gradients).float().view(1), None
