"""The independent reference: transformers' Llama holding the same weights as a policy."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sip_engine.policy.model import PolicyModel
from sip_engine.policy.weights import weight_views


def llama_of(model: PolicyModel, vocab_size: int) -> LlamaForCausalLM:
    """A copy in transformers' own layout: query, key and value apart, gate and up apart, no padding rows."""
    w = weight_views(model, vocab_size, 0)
    assert w.embedding is not None and w.final_norm is not None and w.head is not None, "a pipeline stage"
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=w.embedding.shape[1],
        intermediate_size=w.layers[0].down.shape[1],
        num_hidden_layers=len(w.layers),
        num_attention_heads=w.num_heads,
        num_key_value_heads=w.num_kv_heads,
        head_dim=w.head_dim,
        rms_norm_eps=w.norm_eps,
        max_position_embeddings=w.max_context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    state = {
        "model.embed_tokens.weight": w.embedding[:vocab_size],
        "model.norm.weight": w.final_norm,
        "lm_head.weight": w.head[:vocab_size],
    }
    share = w.num_heads // w.num_kv_heads
    for number, layer in enumerate(w.layers):
        at = f"model.layers.{number}."
        grouped = layer.qkv.view(w.num_kv_heads, share + 2, w.head_dim, -1)
        gate, up = layer.gate_up.chunk(2)
        state |= {
            at + "self_attn.q_proj.weight": grouped[:, :share].flatten(0, 2),
            at + "self_attn.k_proj.weight": grouped[:, share].flatten(0, 1),
            at + "self_attn.v_proj.weight": grouped[:, share + 1].flatten(0, 1),
            at + "self_attn.o_proj.weight": layer.attention_out,
            at + "mlp.gate_proj.weight": gate,
            at + "mlp.up_proj.weight": up,
            at + "mlp.down_proj.weight": layer.down,
            at + "input_layernorm.weight": layer.attention_norm,
            at + "post_attention_layernorm.weight": layer.mlp_norm,
        }
    llama = LlamaForCausalLM(config)
    llama.to(device=w.embedding.device, dtype=w.embedding.dtype)  # pyright: ignore[reportCallIssue]
    llama.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, strict=True)
    return llama.eval()


def llama_logprobs(llama: LlamaForCausalLM, prefix: list[int], suffix: list[int]) -> torch.Tensor:
    """[len(suffix)] log-probs of the suffix given the prefix, each sequence alone, differentiable."""
    ids = torch.tensor([prefix + suffix], device=llama.device)
    logits = llama(ids).logits[0, len(prefix) - 1 : -1]
    return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(suffix)[:, None])[:, 0]
