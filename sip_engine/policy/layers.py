"""The transformer layer: Megatron's, with our norm and core attention, and Transformer Engine's matrices for FP8."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from sip_engine.kernels._impl import uses_triton
from sip_engine.kernels.attention_choice import choose_packed
from sip_engine.kernels.rotary import rotate_pair
from sip_engine.kernels.shared_prefix_attention import shared_prefix_attention
from sip_engine.policy.packing import PackedRows


class RMSNorm(nn.RMSNorm):
    """RMSNorm for Megatron's specs that, unlike its torch wrapper, allows sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        # Megatron sums the gradient of parameters so marked over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SharedPrefixAttention(MegatronModule):
    """Rotary embedding and core attention over a packed stream; the micro-batch's rows arrive as
    `packed_seq_params`.
    """

    def __init__(self, config: TransformerConfig, *_: Any, attention: str = "auto", **__: Any) -> None:
        super().__init__(config)
        assert config.kv_channels is not None
        self.scale = config.kv_channels**-0.5
        self.attention = attention

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: PackedRows, **__: Any
    ) -> Tensor:
        """query [T, 1, H, D], key and value [T, 1, G, D] -> [T, 1, H * D]."""
        layout = packed_seq_params.layout
        assert packed_seq_params.rotary is not None, "the model gives the rows their tables"
        q, k = rotate_pair(query.squeeze(1), key.squeeze(1), *packed_seq_params.rotary)
        impl = None if self.attention == "auto" else self.attention
        if impl is None and uses_triton(q):
            impl = choose_packed("training", q, k.shape[1], layout)
        out = shared_prefix_attention(q, k, value.squeeze(1), layout, scale=self.scale, impl=impl)
        return out.flatten(1).unsqueeze(1)


def submodules_of(part: Any) -> Any:
    """What a part of a layer is made of: Megatron-core gives a spec of it up to 0.16, a partial call later."""
    return part.keywords["submodules"] if isinstance(part, partial) else part.submodules


def block_spec(
    config: TransformerConfig, num_local_layers: int, attention: str = "auto"
) -> TransformerBlockSubmodules:
    """What a pipeline stage's block is made of; with `config.fp8` the matrices are Transformer Engine's.

    Only the matrices: Transformer Engine's fused norm and linear would give parameters other names, and with them
    another sampler, initialiser and exporter.
    """
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts: Any = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    inner = submodules_of(parts.self_attention)
    inner.core_attention = ModuleSpec(SharedPrefixAttention, params={"attention": attention})
    if config.qk_layernorm:
        inner.q_layernorm = inner.k_layernorm = RMSNorm
    if config.fp8:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        mlp = submodules_of(parts.mlp)
        inner.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear
        inner.linear_proj = mlp.linear_fc2 = TERowParallelLinear
    norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_local_layers, layer_norm=norm)
