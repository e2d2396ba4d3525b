"""Which part of the policy's weights each named tensor of a transformers model is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sip_engine.config.model import ModelConfig
from sip_engine.policy.weights import LayerWeights, PolicyWeights


def tensor_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model folder, in the order they are written."""
    hidden, inner, dim = model.hidden_size, model.ffn_size, model.kv_channels
    queries, keys = model.num_heads * dim, model.num_kv_heads * dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if model.qkv_bias:
        layer |= {
            f"self_attn.{x}_proj.bias": (size,) for x, size in zip("qkv", (queries, keys, keys), strict=True)
        }
    if model.qk_norm:
        layer |= {f"self_attn.{x}_norm.weight": (dim,) for x in "qk"}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, hidden)}
    for number in range(model.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (vocab_size, hidden)
    return shapes


def stored_shapes(
    model: ModelConfig, vocab_size: int, *, fused: bool = False, output_bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """`tensor_shapes` of a family whose files fuse matrices, or hold a bias of the attention's output."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(model, vocab_size).items():
        whole = _fused_name(name) if fused else name
        rows = shapes[whole][0] if whole in shapes else 0
        shapes[whole] = (rows + shape[0], *shape[1:])
        if output_bias and name.endswith("self_attn.o_proj.weight"):
            shapes[name.replace(".weight", ".bias")] = shape[:1]
    return shapes


def own_tensors(
    tensors: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    scales: Mapping[str, float],
) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors as those of `shapes`: fused ones split, `scales` (end of a name -> factor) multiplied in.

    A bias of the attention's output passes with its name.
    """
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(_fused_name(name), []).append(name)
    for stored, tensor in tensors:
        if stored in shapes or stored not in parts:
            pieces = [(stored, tensor)]
        else:
            names = parts[stored]
            pieces = list(zip(names, tensor.split([shapes[name][0] for name in names]), strict=True))
        for name, piece in pieces:
            factor = next((value for end, value in scales.items() if name.endswith(end)), None)
            yield name, piece if factor is None else (piece.double() * factor).to(torch.float32)


def _fused_name(name: str) -> str:
    """The matrix of Phi-3 that a matrix is rows of, in the order of `tensor_shapes`; others are their own."""
    name = name.replace("mlp.gate_proj", "mlp.gate_up_proj").replace("mlp.up_proj", "mlp.gate_up_proj")
    for kind in "qkv":
        name = name.replace(f"self_attn.{kind}_proj", "self_attn.qkv_proj")
    return name


def tensor_views(weights: PolicyWeights, *, tied: bool) -> dict[str, Tensor]:
    """The same names with views of an unsharded policy's weights: their elements, in their order.

    A view may have another shape than `tensor_shapes` says (queries are [g, h / g, D, H]) and need not be
    contiguous. Rows that pad the vocabulary are left out.
    """
    assert weights.embedding is not None and weights.final_norm is not None and weights.head is not None
    views = {"model.embed_tokens.weight": weights.embedding[: weights.vocab_size]}
    for number, layer in enumerate(weights.layers):
        views |= {f"model.layers.{number}.{name}": v for name, v in _layer_views(weights, layer).items()}
    views["model.norm.weight"] = weights.final_norm
    if not tied:
        views["lm_head.weight"] = weights.head[: weights.vocab_size]
    return views


def _layer_views(weights: PolicyWeights, layer: LayerWeights) -> dict[str, Tensor]:
    gate, up = layer.gate_up.chunk(2)
    views = {
        "input_layernorm.weight": layer.attention_norm,
        "self_attn.o_proj.weight": layer.attention_out,
        "post_attention_layernorm.weight": layer.mlp_norm,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": layer.down,
    }
    for kind, mixed in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
        if mixed is not None:
            share = weights.num_heads // weights.num_kv_heads
            grouped = mixed.view(weights.num_kv_heads, share + 2, weights.head_dim, *mixed.shape[1:])
            views[f"self_attn.q_proj.{kind}"] = grouped[:, :share]
            views[f"self_attn.k_proj.{kind}"] = grouped[:, share]
            views[f"self_attn.v_proj.{kind}"] = grouped[:, share + 1]
    for name, norm in (("q", layer.q_norm), ("k", layer.k_norm)):
        if norm is not None:
            views[f"self_attn.{name}_norm.weight"] = norm
    return views
