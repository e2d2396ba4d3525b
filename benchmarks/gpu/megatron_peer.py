"""Megatron-core's dynamic inference engine over a policy's weights, by the interface of whichever line imports.

Its attention bypasses a model's own and calls flash-attn (2.7.3 or later, or 3), so that it runs on CUDA only.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from sip_engine.config.model import ModelConfig
from sip_engine.config.schema import ParallelConfig
from sip_engine.distributed.megatron_cpu import megatron_device
from sip_engine.policy.model import PolicyModel, padded_vocab_size, transformer_config

BUFFER_GB = 24


def plain_model(policy: PolicyModel, config: ModelConfig, vocab: int) -> GPTModel:
    """Megatron's own GPT model with a policy's weights, its local layers and its rotary embedding, in eval mode."""
    settings = transformer_config(config, ParallelConfig())
    with megatron_device():
        model = GPTModel(
            settings,
            get_gpt_layer_local_spec(qk_layernorm=config.qk_norm, normalization="RMSNorm"),
            padded_vocab_size(vocab, 1),
            config.max_context,
            position_embedding_type="rope",
            rotary_base=int(config.rope_base),
            share_embeddings_and_output_weights=config.tie_embeddings,
        )
    weights = {name: value for name, value in policy.state_dict().items() if torch.is_tensor(value)}
    known = model.state_dict()
    model.load_state_dict({name: weights.get(name, known[name]) for name in known})
    absent = [name for name, value in known.items() if torch.is_tensor(value) and name not in weights]
    assert not [name for name in absent if name.endswith("weight")], absent
    return model.to(next(policy.parameters()).device, next(policy.parameters()).dtype).eval()


def tokenizer_of(vocab: int) -> Any:
    """What the engine asks of a tokenizer, where prompts are token ids: no end, and text that nobody reads."""
    return SimpleNamespace(
        vocab_size=vocab, eod=-1, bos=None, detokenize=lambda ids, **_: "", tokenize=lambda text: []
    )


def sampling_of(new: int) -> SamplingParams:
    """Temperature 1 without cut-off, and the log-probs of what is drawn."""
    return SamplingParams(
        temperature=1.0, top_k=0, top_p=0.0, num_tokens_to_generate=new, termination_id=-1,
        return_log_probs=True, skip_prompt_log_probs=True,
    )  # fmt: skip


def engine_of(policy: PolicyModel, config: ModelConfig, vocab: int, most: int) -> Any:
    """For `most` requests at a time, with CUDA graphs where the line takes them from the model's settings."""
    model = plain_model(policy, config, vocab)
    if "inference_config" in inspect.signature(DynamicInferenceContext).parameters:
        return _engine_019(model, config, vocab, most)
    return _engine_016(model, config, vocab, most)


def _engine_019(model: GPTModel, config: ModelConfig, vocab: int, most: int) -> Any:
    from megatron.core.inference.config import (  # pyright: ignore[reportMissingImports]
        InferenceConfig,
    )

    settings = InferenceConfig(
        buffer_size_gb=BUFFER_GB,
        max_requests=most,
        max_sequence_length=config.max_context,
        enable_prefix_caching=True,
    )
    context = DynamicInferenceContext(model.config, settings)  # pyright: ignore
    wrapper = GPTInferenceWrapper(model, context)  # pyright: ignore
    controller = TextGenerationController(wrapper, tokenizer_of(vocab))
    return DynamicInferenceEngine(controller, context)


def _engine_016(model: GPTModel, config: ModelConfig, vocab: int, most: int) -> Any:
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
        InferenceWrapperConfig,
    )

    dtype = next(model.parameters()).dtype
    context = DynamicInferenceContext(
        params_dtype=dtype,
        num_layers=config.num_layers,
        kv_channels=config.kv_channels,
        num_attention_heads=config.num_kv_heads,
        max_sequence_length=config.max_context,
        buffer_size_gb=BUFFER_GB,
        max_requests=most,
    )
    wrapper = GPTInferenceWrapper(
        model,
        InferenceWrapperConfig(
            hidden_size=config.hidden_size,
            params_dtype=dtype,
            inference_batch_times_seqlen_threshold=-1,
            padded_vocab_size=padded_vocab_size(vocab, 1),
            inference_max_requests=most,
            inference_max_seq_length=config.max_context,
        ),
        context,
    )
    controller = TextGenerationController(wrapper, tokenizer_of(vocab))
    return DynamicInferenceEngine(controller, context, random_seed=1, enable_chunked_prefill=False)
