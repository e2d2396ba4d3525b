"""The log-prob head of other libraries: mean NLL, or a token's, with its gradients of hidden states and weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.peers import Beside, Tensors, why_missing

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [N, H], weight [V, H], targets [N] int64) -> mean NLL, or [N] NLL."""


def liger_mean() -> Head:
    """Its Triton kernels; gradients are computed in the forward pass."""
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def liger_tokens() -> Head:
    """A token's NLL. On Hopper its CuTe kernels (which need `liger-kernel[cutedsl]`), elsewhere chunks of torch."""
    from liger_kernel.ops import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    return LigerFusedLinearScaledCrossEntropyFunction.apply


def quack_mean() -> Head:
    """CuTe kernels over chunks of tokens; token and vocabulary counts are multiples of 8."""
    from quack.linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        chunked_linear_cross_entropy,
    )

    return chunked_linear_cross_entropy


def cut_cross_entropy_mean() -> Head:
    """With all gradients: by default it leaves out those below a threshold."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, filter_eps=None)


def _beside(library: str, load: Callable[[], Head], of_ours: Callable[[Tensors], Tensors]) -> Beside:
    def prepare(inputs: dict[str, Any]) -> Callable[[], Tensors]:
        head = load()
        hidden, weight = (inputs[name].detach().requires_grad_() for name in ("hidden", "weight"))

        def call() -> Tensors:
            found = head(hidden, weight, inputs["targets"])
            return (found.detach(), *torch.autograd.grad(found.mean(), (hidden, weight)))

        return call

    return Beside(prepare, partial(why_missing, library), of_ours, capture=False)


def _mean(ours: Tensors) -> Tensors:
    """Of log-probs and the gradients of their mean."""
    return -ours[0].mean(), -ours[1], -ours[2]


def head_peers() -> dict[str, Beside]:
    """Beside the case of our log-prob head, whose results are log-probs [N] and the gradients of their mean."""
    return {
        "Liger": _beside("Liger", liger_mean, _mean),
        "Liger, log-probs": _beside("Liger", liger_tokens, lambda ours: tuple(-x for x in ours)),
        "quack": _beside("quack", quack_mean, _mean),
        "cut-cross-entropy": _beside("cut-cross-entropy", cut_cross_entropy_mean, _mean),
    }
