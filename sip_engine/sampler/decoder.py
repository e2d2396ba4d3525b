"""The transformer forward pass over the policy's weight views; attention and its cache are passed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sip_engine.distributed.mesh import Axis
from sip_engine.kernels._impl import uses_triton
from sip_engine.kernels.exact import exact_linear
from sip_engine.kernels.fp8_linear import Fp8Weight, fp8_linear
from sip_engine.kernels.rms_norm import rms_norm
from sip_engine.kernels.rotary import rotary
from sip_engine.kernels.store_qkv import split_qkv, store_qkv
from sip_engine.kernels.swiglu import swiglu
from sip_engine.policy.weights import LayerWeights, PolicyWeights
from sip_engine.sampler.fp8_weights import Fp8Weights, Matrix


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values of N new tokens as one matrix holds them, neither normalised nor rotated."""

    mixed: Tensor
    """[N, kv_heads * (share + 2) * D]"""
    layer: LayerWeights
    weights: PolicyWeights
    cos: Tensor
    sin: Tensor
    positions: Tensor

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, heads, D], k and v [N, kv_heads, D], rotated."""
        q, k, v = split_qkv(self.mixed, self.weights.num_local_kv_heads, self.weights.head_dim)
        if self.layer.q_norm is not None:
            q = F.rms_norm(q, q.shape[-1:], self.layer.q_norm, self.weights.norm_eps)
        if self.layer.k_norm is not None:
            k = F.rms_norm(k, k.shape[-1:], self.layer.k_norm, self.weights.norm_eps)
        return (
            rotary(q, self.cos, self.sin, self.positions),
            rotary(k, self.cos, self.sin, self.positions),
            v,
        )

    def store(self, keys: Tensor, values: Tensor, slots: Tensor, **options: Any) -> Tensor:
        """Keys and values go to `slots` of the pages; returns the rotated queries. `options` are `store_qkv`'s."""
        return store_qkv(
            self.mixed,
            self.cos,
            self.sin,
            self.positions,
            keys,
            values,
            slots,
            q_norm=self.layer.q_norm,
            k_norm=self.layer.k_norm,
            eps=self.weights.norm_eps,
            **options,
        )


class Attend(Protocol):
    """Stores new keys and values of a layer and attends to all a token may see."""

    def __call__(self, layer: int, projected: Projected) -> Tensor:
        """Returns [N, heads, D]."""
        ...


class Decoder:
    """Runs tokens through the shared weights of one tensor-parallel shard and pipeline stage, without gradient."""

    def __init__(
        self, weights: PolicyWeights, tp: Axis, *, exact: bool = False, fp8: Fp8Weights | None = None
    ) -> None:
        """`exact` gives every row the same bits in any batch and at any tensor-parallel size, and is slow.

        fp8: the matrices to read in the place of the weights' own.
        """
        self.weights, self.tp, self.exact, self.fp8 = weights, tp, exact, fp8
        positions = torch.arange(weights.max_context, dtype=torch.float32, device=weights.device)
        angles = torch.outer(positions, weights.inv_freq)
        # Rounded as the trainer rounds them, which keeps its tables in the parameters' type.
        self._cos, self._sin = (table.to(weights.dtype).float() for table in (angles.cos(), angles.sin()))

    def forward(self, inputs: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """One pass through this stage's layers.

        inputs: token ids [N] int64 on the first stage, the stage before's output [N, H] on others.
        positions: [N] int64. Returns [N, H]; on the last stage normalised, ready for the head.
        """
        w = self.weights
        hidden = inputs if w.embedding is None else self._embed(inputs, w.embedding)
        x = self._norm(hidden, w.layers[0].attention_norm)
        next_norms = [*(layer.attention_norm for layer in w.layers[1:]), w.final_norm]
        for number, (layer, next_norm) in enumerate(zip(w.layers, next_norms, strict=True)):
            mixed = self._columns(x, self._matrix(number, "qkv"), layer.qkv_bias)
            attended = attend(number, Projected(mixed, layer, w, self._cos, self._sin, positions))
            x, hidden = self._add_norm(
                self._rows(attended.flatten(1), self._matrix(number, "attention_out")), hidden, layer.mlp_norm
            )
            gated = self._gate(self._columns(x, self._matrix(number, "gate_up")))
            added = self._rows(gated, self._matrix(number, "down"))
            if next_norm is None:
                return hidden + added
            x, hidden = self._add_norm(added, hidden, next_norm)
        return x

    def _embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        # -1 stands for a token that could not be drawn; the sampler reports it when the wave is done.
        if self.tp.size == 1:
            return F.embedding(tokens.clamp(min=0), table)
        local = tokens - self.weights.tp_rank * len(table)
        outside = (local < 0) | (local >= len(table))
        rows = F.embedding(local.masked_fill(outside, 0), table)
        return self._sum_shards(rows.masked_fill(outside[:, None], 0.0))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Our kernel with CUDA; on the CPU torch's own single pass is the fastest."""
        if uses_triton(x):
            return rms_norm(x, weight, self.weights.norm_eps)
        return F.rms_norm(x, x.shape[-1:], weight, self.weights.norm_eps)

    def _add_norm(self, x: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of hidden + x, and that sum."""
        if uses_triton(x):
            return rms_norm(x, weight, self.weights.norm_eps, residual=hidden)
        hidden = hidden + x
        return self._norm(hidden, weight), hidden

    def _matrix(self, layer: int, name: Matrix) -> Tensor | Fp8Weight:
        quantised = None if self.fp8 is None else self.fp8.of(layer, name)
        return getattr(self.weights.layers[layer], name) if quantised is None else quantised

    def _columns(self, x: Tensor, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> Tensor:
        """x times a matrix whose outputs are sharded."""
        if isinstance(weight, Fp8Weight):
            return fp8_linear(x, weight, bias)
        return exact_linear(x, weight, bias) if self.exact else F.linear(x, weight, bias)

    def _gate(self, gate_up: Tensor) -> Tensor:
        """SwiGLU. Vector and scalar code round exp differently, and which runs depends on the shard's width."""
        if not self.exact:
            return swiglu(gate_up)
        gate, value = gate_up.double().chunk(2, dim=-1)
        return (F.silu(gate.contiguous()) * value).to(gate_up.dtype)

    def _rows(self, x: Tensor, weight: Tensor | Fp8Weight) -> Tensor:
        """x times a matrix whose inputs are sharded, summed over the shards."""
        if isinstance(weight, Fp8Weight):
            return self._sum_shards(fp8_linear(x, weight))
        if not self.exact:
            return self._sum_shards(F.linear(x, weight))
        num_terms = x.shape[1] * self.tp.size
        return exact_linear(
            x, weight, num_terms=num_terms, across_max=self._max_shards, across_sum=self._sum_shards
        )

    def _max_shards(self, x: Tensor) -> Tensor:
        if self.tp.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.tp.group)
        return x

    def _sum_shards(self, x: Tensor) -> Tensor:
        if self.tp.size > 1:
            dist.all_reduce(x, group=self.tp.group)
        return x
