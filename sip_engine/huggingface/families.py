"""`config.json` of the supported families in our settings' words, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sip_engine.config.schema import ModelConfig
from sip_engine.utils.errors import CheckpointError

# (model_type, qkv_bias, qk_norm) of each architecture.
_FAMILIES = {
    "LlamaForCausalLM": ("llama", False, False),
    "Qwen2ForCausalLM": ("qwen2", True, False),
    "Qwen3ForCausalLM": ("qwen3", False, True),
}
# What a config may switch on that the policy has not, with the only value it may have.
_ABSENT = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


@dataclass(frozen=True)
class SourceConfig:
    """A folder's `config.json`, understood."""

    model: ModelConfig
    """Of precision "auto"."""
    vocab_size: int
    raw: dict[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; CheckpointError when it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give a folder written by save_pretrained") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, must be a JSON object")
    return value


def read_config(folder: Path) -> SourceConfig:
    """What `folder/config.json` says of the model.

    Raises:
        CheckpointError: the file is missing or damaged, the architecture is another one, or the model has
            a part that the policy has not; the message names it.
    """
    path = folder / "config.json"
    raw = read_json(path)
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise CheckpointError(
            f"{path}: architecture {architecture!r} is not supported; supported: {', '.join(_FAMILIES)}"
        )
    for name, value in _ABSENT.items():
        if raw.get(name, value) not in (value, None):
            raise CheckpointError(f"{path}: {name}={raw[name]!r} is not supported; it must be {value!r}")
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        raise CheckpointError(f"{path}: layer_types other than full_attention are not supported")
    _, qkv_bias, qk_norm = _FAMILIES[architecture]
    try:
        model = ModelConfig(
            num_layers=raw["num_hidden_layers"],
            hidden_size=raw["hidden_size"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim"),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            ffn_size=raw["intermediate_size"],
            max_context=raw.get("max_position_embeddings", 2048),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            init_std=raw.get("initializer_range", 0.02),
            **_read_rope(path, raw),
        )
        vocab_size = raw["vocab_size"]
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise CheckpointError(
            f"{path}: {where} {fault['msg'].removeprefix('Value error, ')}".strip()
        ) from None
    if type(vocab_size) is not int or vocab_size < 1:
        raise CheckpointError(f"{path}: vocab_size={vocab_size!r} must be a number above 0")
    return SourceConfig(model, vocab_size, raw)


def _read_rope(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Both spellings: rope_theta beside rope_scaling, and rope_parameters since transformers 5."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind not in ("default", "llama3") or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"{path}: rope scaling {kind!r} is not supported; supported: default, llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor is not supported; it must be 1.0")
    base = {"rope_base": rope.get("rope_theta", raw.get("rope_theta", 10000.0))}
    if kind == "default":
        return base
    return base | {
        "rope_factor": rope["factor"],
        "rope_low_freq_factor": rope["low_freq_factor"],
        "rope_high_freq_factor": rope["high_freq_factor"],
        "rope_original_context": rope["original_max_position_embeddings"],
    }


def config_json(
    model: ModelConfig, vocab_size: int, *, bos_id: int, eos_id: int, dtype: str
) -> dict[str, Any]:
    """A `config.json` that transformers 4 and 5 read; dtype in torch's words ("float32").

    Raises:
        CheckpointError: no family has this model's parts.
    """
    parts = model.qkv_bias, model.qk_norm
    named = [name for name, family in _FAMILIES.items() if family[1:] == parts]
    if not named:
        raise CheckpointError(
            "no supported family has both qkv_bias and qk_norm: this model cannot be exported"
        )
    scaling = None
    if model.rope_factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": model.rope_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_context,
        }
    return {
        "architectures": named,
        "model_type": _FAMILIES[named[0]][0],
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_context,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_scaling": scaling,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "use_cache": True,
        "use_sliding_window": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }
