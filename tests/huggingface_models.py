"""Tiny models and tokenizers in transformers' folders, and their log-probs: the reference for import and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_ranks import random_rows
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

from sip_engine.config.schema import SamplerConfig
from sip_engine.policy.packing import pack_rows
from sip_engine.policy.policy import score
from sip_engine.policy.rows import Row
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.files import load_policy
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler

TEXTS = ["the quick brown fox jumps over the lazy dog", "a naïve café, 12 of 345 — it's here"] * 20
SAMPLE = "  The fox's\n\n\tcafé <s> <|endoftext|> 2024 \u2581 漢字 \U0001f600 \u00c5  dog "
PIECES = 310

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 20000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 24,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0625,
    "residual_multiplier": 0.22,
    "logits_scaling": 3.0,
}
# Family, what differs from the common shape. Wide heads: head_dim is not hidden_size / num_heads.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": PLAIN_ROPE, "rms_norm_eps": 1e-5}),
    "llama tied, stretched, wide": (
        "Llama",
        {"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "qwen2": ("Qwen2", {"rope_parameters": PLAIN_ROPE}),
    "qwen2 tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"rope_parameters": PLAIN_ROPE, "head_dim": 8}),
    "qwen3 tied, wide": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "llama linear": ("Llama", {"rope_parameters": {**PLAIN_ROPE, "rope_type": "linear", "factor": 4.0}}),
    "llama dynamic": ("Llama", {"rope_parameters": {**PLAIN_ROPE, "rope_type": "dynamic", "factor": 4.0}}),
    "llama with biases": ("Llama", {"attention_bias": True}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": YARN, "head_dim": 8}),
    "qwen3 yarn": ("Qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.25}, "head_dim": 16}),
    "mistral, wide": ("Mistral", {"head_dim": 12, "sliding_window": None}),
    "ministral": (
        "Ministral",
        {"head_dim": 8, "sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3, fused": ("Phi3", {"pad_token_id": 0, "rope_parameters": PLAIN_ROPE}),
    "smollm3 with all positions": ("SmolLM3", {"no_rope_layers": [1, 1], "pad_token_id": 0}),
    "granite": ("Granite", {"rope_parameters": PLAIN_ROPE, "attention_multiplier": 8**-0.5}),
    "granite multiplied": ("Granite", {**GRANITE, "tie_word_embeddings": False}),
    "granite multiplied, tied": ("Granite", {**GRANITE, "tie_word_embeddings": True}),
}


def write_model(
    folder: Path, name: str, *, vocab_size: int = PIECES, bos_id: int | None = 1, save: dict | None = None
) -> Any:
    """A model of transformers with every parameter random, norms and biases too, saved to `folder`."""
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 96,
            "bos_token_id": bos_id,
            "eos_token_id": 2,
            **changes,
        }
    )
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2)
            parameter += parameter.ndim == 1  # norms and biases around 1
        for name, parameter in made.named_parameters():
            if name.endswith("o_proj.bias"):
                parameter.zero_()
    made.save_pretrained(folder, **(save or {}))
    return made


def write_byte_level(folder: Path, *, normalize: bool = True) -> None:
    """A `tokenizer.json` in Qwen's way: bytes as characters, Unicode composed, special and plain added tokens."""
    fast = Fast(models.BPE())
    fast.normalizer = normalizers.NFC() if normalize else normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    fast.add_special_tokens(
        [AddedToken("<|endoftext|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    fast.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def transformers_logprobs(model: Any, rows: list[Row]) -> torch.Tensor:
    """[num_targets] log-probs of all suffix tokens, each sequence alone; differentiable."""
    found = []
    for row in rows:
        suffixes = row.suffixes
        if all(len(s) == 1 for s in suffixes):  # one pass for all
            logits = model(torch.from_numpy(row.prefix).long()[None]).logits[0, -1]
            found.append(torch.log_softmax(logits, -1)[[int(s[0]) for s in suffixes]])
            continue
        for suffix in suffixes:
            ids = torch.from_numpy(np.concatenate([row.prefix, suffix])).long()
            logits = model(ids[None]).logits[0, len(row.prefix) - 1 : -1]
            found.append(torch.log_softmax(logits, -1).gather(1, ids[len(row.prefix) :, None])[:, 0])
    return torch.cat(found)


def assert_same_distribution(checkpoint: Path, model: Any) -> None:
    """Scores and the sampler's own log-probs of a checkpoint are those of a model of transformers."""
    policy = load_policy(checkpoint)
    rows = random_rows(0, policy.tokenizer.vocab_size)
    with torch.no_grad():
        got = score(policy.model, [pack_rows(rows, policy.mesh.device)])[0]
        torch.testing.assert_close(got, transformers_logprobs(model, rows), atol=1e-5, rtol=0)
        sampler = Sampler(
            weight_views(policy.model, policy.tokenizer.vocab_size, 0), policy.mesh, SamplerConfig()
        )
        requests = [Request(row.prefix, 2, document=n) for n, row in enumerate(rows)]
        completions = sampler.generate(requests, SamplingParams(max_new_tokens=12, seed=1))
        for row, group in zip(rows, completions, strict=True):
            want = transformers_logprobs(model, [Row(row.prefix, tuple(c.ids for c in group))])
            got = torch.from_numpy(np.concatenate([c.logprobs for c in group]))
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
