"""Megatron-core's GPT model as the policy: packed rows in, log-probs of suffix tokens out."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from sip_engine.config.model import ModelConfig
from sip_engine.config.schema import ParallelConfig
from sip_engine.distributed.megatron_cpu import megatron_device
from sip_engine.distributed.mesh import Axis, Mesh
from sip_engine.kernels._impl import SWITCH
from sip_engine.kernels.logprob_head import logprob_head
from sip_engine.policy.initialise import initialise
from sip_engine.policy.layers import block_spec
from sip_engine.policy.packing import PackedRows
from sip_engine.policy.precision import check_precision, fp8_settings, parameter_dtype
from sip_engine.utils.errors import ConfigError


class PolicyModel(GPTModel):
    """A GPT model whose input is a `PackedRows` and whose last stage returns target log-probs.

    Rotary angles follow the rows' own positions, so that every suffix continues its prefix; our attention turns
    queries and keys by them (`policy/layers.py`), in Megatron's place. The head, fused with the log-prob, is applied
    to the rows' scored positions only. The buffer `inv_freq` is set by `build_model`.
    """

    def __init__(
        self, *args: Any, true_vocab_size: int, tp: Axis, attention: str = "auto", **kwargs: Any
    ) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.attention = attention
        self.true_vocab_size = true_vocab_size
        self.tp = tp

    def forward(self, rows: PackedRows) -> Tensor:  # type: ignore[override]
        """Last stage: [num_targets] float32 log-probs in nats. Other stages: hidden states [T, 1, hidden]."""
        angles = rows.layout.positions[:, None].float() * self.get_buffer("inv_freq")  # [T, D / 2]
        # In the parameters' type, as the sampler's: what Megatron's own rotation makes of them.
        tables = (table.to(self.config.params_dtype).float() for table in (angles.cos(), angles.sin()))
        rows = replace(rows, rotary=tuple(tables))
        return super().forward(
            rows.tokens[None],
            rows.layout.positions[None],
            attention_mask=None,  # type: ignore[arg-type]
            labels=rows.targets,
            packed_seq_params=rows,  # type: ignore[arg-type]
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's, where this model's own group says which processes hold copies of the same shard."""
        copies = {"dp_cp_group": self.pg_collection.dp_cp}
        return super().sharded_state_dict(prefix, sharded_offsets, copies | (metadata or {}))

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor, packed_seq_params: PackedRows, **_: Any
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        # Either way the backward pass sums the vocabulary shards' gradients of the hidden states.
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states)
        scored = hidden_states[:, 0].index_select(0, packed_seq_params.scored)  # [num_targets, hidden]
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        assert weight is not None, "the last stage holds the head"
        return logprob_head(
            scored,
            weight,
            labels,
            vocab_start=self.tp.rank * len(weight),
            true_vocab_size=self.true_vocab_size,
            gather=self.tp.stack if self.tp.size > 1 else None,
        )


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Vocabulary rows of the embedding: the next multiple of 64 times the tensor-parallel size."""
    multiple = 64 * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def rotary_frequencies(model: ModelConfig) -> Tensor:
    """[head_dim / 2] float32, radians a position, stretched by `rope_factor` as `rope_scaling` says."""
    dim = model.kv_channels
    plain = 1.0 / model.rope_base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if model.rope_scaling == "linear":
        return plain / model.rope_factor
    if model.rope_scaling == "yarn":
        kept = _yarn_kept(model)
    else:
        turns = model.rope_original_context * plain / (2 * math.pi)  # in the original context
        low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / model.rope_factor)


def _yarn_kept(model: ModelConfig) -> Tensor:
    """[head_dim / 2] float32: how far YaRN keeps each frequency, 1 to 0 over whole channel numbers (section 3.2)."""
    dim = model.kv_channels

    def channel(turns: float) -> float:
        """The pair of channels that turns so often in the original context."""
        wavelength = model.rope_original_context / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(model.rope_base))

    first = max(math.floor(channel(model.rope_beta_fast)), 0)
    last = min(math.ceil(channel(model.rope_beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / max(last - first, 1e-3)
    return 1 - ramp.clamp(0, 1)


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Our settings in Megatron's words.

    Of its fusions SwiGLU's is on with CUDA, forward and backward, which `torch.compile` makes. The others need CUDA
    extensions, or fuse a bias and a dropout, of which this model has none.
    """
    dtype = parameter_dtype(model.precision)
    fuses = torch.cuda.is_available() and os.environ.get(SWITCH, "auto") != "reference"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.kv_channels,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        variable_seq_lengths=parallel.pipeline > 1,
        # Without experts it dispatches nothing, but the default refuses variable lengths.
        moe_token_dispatcher_type="alltoall",
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        **_RECOMPUTE[parallel.recompute],
        **fp8_settings(model),
        bias_activation_fusion=fuses,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def build_model(
    model: ModelConfig, parallel: ParallelConfig, vocab_size: int, mesh: Mesh, *, seed: int
) -> PolicyModel:
    """This process' part of the model, on its device, with weights that depend on the seed only.

    The part is that of the mesh given, which may be a view of the processes' own (`Mesh.without_pipeline`).

    Raises:
        ConfigError: the padded vocabulary does not divide over the tensor-parallel processes, or FP8 cannot run.
    """
    check_precision(model, parallel)
    config = transformer_config(model, parallel)
    padded = padded_vocab_size(vocab_size, parallel.tensor)
    if padded % mesh.tp.size:
        raise ConfigError(f"vocabulary of {padded} rows does not divide over {mesh.tp.size} processes")
    with megatron_device():
        built = PolicyModel(
            config,
            block_spec(config, model.num_layers // parallel.pipeline, model.attention),
            vocab_size=padded,
            max_sequence_length=model.max_context,
            pre_process=mesh.pp.is_first,
            post_process=mesh.pp.is_last,
            share_embeddings_and_output_weights=model.tie_embeddings,
            true_vocab_size=vocab_size,
            tp=mesh.tp,
            attention=model.attention,
            pg_collection=mesh.megatron_groups(),
        )
        built = built.to(device=mesh.device, dtype=config.params_dtype)
        # After the cast: in bf16, angles of late positions would be off by radians.
        built.register_buffer("inv_freq", rotary_frequencies(model).to(mesh.device), persistent=False)
    initialise(
        built,
        mesh.tp,
        seed=seed,
        std=model.init_std,
        num_layers=model.num_layers,
        first_layer=mesh.pp.rank * (model.num_layers // parallel.pipeline),
        vocab_size=vocab_size,
        tied=model.tie_embeddings,
    )
    return built
