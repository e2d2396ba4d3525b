"""The policy's own parameters as the sampler sees them: zero-copy views, checked for identity each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sip_engine.kernels.fp8_linear import Recipe
from sip_engine.policy.model import PolicyModel
from sip_engine.policy.precision import fp8_recipes


@dataclass(frozen=True)
class LayerWeights:
    """One transformer layer, this tensor-parallel shard.

    H hidden, D head dim, h query and g key/value heads of the shard, F inner width of the shard.
    """

    attention_norm: Tensor
    """[H]"""
    qkv: Tensor
    """[g * (h / g + 2) * D, H]: for each key/value head its query heads, then key, then value."""
    attention_out: Tensor
    """[H, h * D]"""
    mlp_norm: Tensor
    """[H]"""
    gate_up: Tensor
    """[2 F, H]: gate rows, then up rows."""
    down: Tensor
    """[H, F]"""
    qkv_bias: Tensor | None = None
    """[g * (h / g + 2) * D], in the order of `qkv`'s rows."""
    q_norm: Tensor | None = None
    """[D], of every query head."""
    k_norm: Tensor | None = None
    """[D], of every key head."""


@dataclass(frozen=True)
class PolicyWeights:
    """All weights of one process, and the numbers needed to use them."""

    embedding: Tensor | None
    """[vocabulary rows of the shard, H]; None after the first pipeline stage."""
    layers: tuple[LayerWeights, ...]
    """Of this pipeline stage."""
    final_norm: Tensor | None
    """[H]; None before the last pipeline stage, like the head."""
    head: Tensor | None
    """[vocabulary rows of the shard, H]; the embedding itself when tied."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    inv_freq: Tensor
    """[D / 2] float32, rotary frequencies."""
    tp_rank: int
    vocab_size: int
    """True vocabulary; rows at and above it are padding and are never sampled."""
    max_context: int
    attention: str = "auto"
    """As model.attention."""
    fp8: tuple[Recipe | None, ...] = ()
    """How the trainer quantises the matrices of each layer of this stage; None where they stay as they are, or where
    only it knows their scales. Empty: none is quantised."""

    @property
    def num_local_kv_heads(self) -> int:
        return self.layers[0].qkv.shape[0] // self.head_dim // (self.num_heads // self.num_kv_heads + 2)

    @property
    def vocab_start(self) -> int:
        """First vocabulary row of the shard."""
        table = self.embedding if self.head is None else self.head
        assert table is not None, "a middle stage holds no vocabulary"
        return self.tp_rank * table.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.layers[0].attention_norm.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].qkv.dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].qkv.device

    def tensors(self) -> list[Tensor]:
        """Every tensor this process holds a view of."""
        per_layer = [tensor for layer in self.layers for tensor in vars(layer).values()]
        everything = (self.embedding, self.final_norm, self.head, *per_layer)
        return [tensor for tensor in everything if tensor is not None]


def weight_views(model: PolicyModel, vocab_size: int, tp_rank: int) -> PolicyWeights:
    """Views of this process' part of a model, taken after DDP has wrapped it.

    The distributed optimizer moves parameters into its own buffers when DDP wraps the model, so views
    taken before would go stale.
    """
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    config = model.config
    assert config.num_query_groups is not None and config.kv_channels is not None

    def layer(number: int) -> LayerWeights:
        at = f"decoder.layers.{number}."
        return LayerWeights(
            attention_norm=parameters[at + "input_layernorm.weight"],
            qkv=parameters[at + "self_attention.linear_qkv.weight"],
            attention_out=parameters[at + "self_attention.linear_proj.weight"],
            mlp_norm=parameters[at + "pre_mlp_layernorm.weight"],
            gate_up=parameters[at + "mlp.linear_fc1.weight"],
            down=parameters[at + "mlp.linear_fc2.weight"],
            qkv_bias=parameters.get(at + "self_attention.linear_qkv.bias"),
            q_norm=parameters.get(at + "self_attention.q_layernorm.weight"),
            k_norm=parameters.get(at + "self_attention.k_layernorm.weight"),
        )

    embedding = parameters.get("embedding.word_embeddings.weight")
    tied_here = model.post_process and model.share_embeddings_and_output_weights and model.pre_process
    layers: Any = model.decoder.layers
    numbers = [layer.layer_number - 1 for layer in layers]
    return PolicyWeights(
        embedding=embedding,
        layers=tuple(layer(n) for n in range(len(model.decoder.layers))),
        final_norm=parameters.get("decoder.final_layernorm.weight"),
        head=embedding if tied_here else parameters.get("output_layer.weight"),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        norm_eps=config.layernorm_epsilon,
        inv_freq=model.get_buffer("inv_freq"),
        tp_rank=tp_rank,
        vocab_size=vocab_size,
        max_context=model.max_sequence_length,
        attention=model.attention,
        fp8=fp8_recipes(config, numbers),
    )


def assert_shared(views: PolicyWeights, model: PolicyModel) -> None:
    """Every view must still be the storage the optimizer updates; called before each generation."""
    now = weight_views(model, views.vocab_size, views.tp_rank)
    for ours, theirs in zip(views.tensors(), now.tensors(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr() and ours.shape == theirs.shape, (
            "the sampler's view of a parameter is no longer the policy's storage"
        )


def num_parameters(model: torch.nn.Module) -> int:
    """Parameters of this process' part of a model."""
    return sum(p.numel() for p in model.parameters())
