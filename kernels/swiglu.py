"""SwiGLU: the gated activation of Llama's feed-forward layer.

N: rows (tokens), F: feed-forward size. First half of x: gate, second half: value:

    y = gate * sigmoid(gate) * value                  (in float32, rounded once)
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from sip_engine.kernels._impl import Impl, resolve_impl


def swiglu_reference(x: Tensor) -> Tensor:
    """The definition, in plain torch. See `swiglu`."""
    gate, value = x.float().chunk(2, dim=-1)
    return (silu(gate) * value).to(x.dtype)


def swiglu(x: Tensor, *, impl: Impl | None = None) -> Tensor:
    """silu(x[:, :F]) * x[:, F:] for `x` [N, 2F]; returns [N, F]."""
    resolve_impl(impl, x, ("reference",))
    return swiglu_reference(x)
