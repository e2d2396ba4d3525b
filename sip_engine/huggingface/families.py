"""`config.json` of the supported families in our settings' words, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sip_engine.config.model import ModelConfig
from sip_engine.utils.errors import CheckpointError
from sip_engine.utils.regular import read_text


@dataclass(frozen=True)
class Family:
    """How an architecture differs from Llama; what it computes is otherwise the same."""

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    """Queries, keys and values lie in one matrix, gate and up in another (Phi-3)."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Settings that may have one value only, the one by which it computes what Llama does."""
    written: bool = False
    """Whether a policy of its parts is exported as it."""


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", written=True),  # also Yi, SmolLM 1 and 2
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, only={"use_sliding_window": False}, written=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, only={"use_sliding_window": False}, written=True),
    "MistralForCausalLM": Family("mistral"),
    "MinistralForCausalLM": Family("ministral"),
    "Phi3ForCausalLM": Family("phi3", fused=True),
    "SmolLM3ForCausalLM": Family("smollm3"),
    "GraniteForCausalLM": Family("granite"),
}
# What a config may switch on that the policy has not, with the only value it may have.
_ABSENT = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_EXPERTS = (
    "a mixture of experts, and the policy is dense. It would need Megatron's expert layers in the policy and a "
    "routed step in the sampler; import a dense model"
)
_PLANS = {
    "Moe": _EXPERTS,
    "MoE": _EXPERTS,
    "Mixtral": _EXPERTS,
    "Deepseek": f"latent attention and {_EXPERTS}",
    "Olmo2": "its norms stand behind attention and MLP, and its query and key norms span all heads; the policy's "
    "stand in front and span one head",
    "Gemma": "its norms add one to their weights and its MLP has another activation",
    "GptOss": "a mixture of experts with attention sinks: the policy has neither",
}
"""Why architectures whose name holds one of these are refused."""


@dataclass(frozen=True)
class SourceConfig:
    """A folder's `config.json`, understood."""

    model: ModelConfig
    """Of precision "auto"."""
    vocab_size: int
    raw: dict[str, Any]
    family: Family = Family("llama")
    output_bias: bool = False
    """Whether files hold a bias of the attention's output, which must be 0."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """End of a tensor's name -> factor that goes into its weights, for what the policy does not multiply by."""
    notes: tuple[str, ...] = ()
    """A line for each thing that is not as in transformers, or was decided here."""


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; CheckpointError when it is missing or something else."""
    try:
        value = json.loads(read_text(path))
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
    if folder.is_file():
        raise CheckpointError(f"{folder}: a file; give a model's folder, or --gguf with a .gguf")
    if (folder / "adapter_config.json").is_file():  # transformers would load it beside a whole model, too
        raise CheckpointError(
            f"{folder}: holds an adapter (adapter_config.json), which is no model: merge it into its base "
            "(peft's merge_and_unload), save that, and import it"
        )
    raw = read_json(path)
    family = _family_of(path, folder, raw)
    for name, value in {**_ABSENT, **family.only}.items():
        if raw.get(name, value) not in (value, None):
            raise CheckpointError(f"{path}: {name}={raw[name]!r} is not supported; it must be {value!r}")
    has_bias = bool(raw.get("attention_bias"))
    try:
        rope, query_scale, notes = _read_rope(path, raw)
        context, window_notes = _read_context(path, raw)
        model = ModelConfig(
            num_layers=raw["num_hidden_layers"],
            hidden_size=raw["hidden_size"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim"),
            qkv_bias=family.qkv_bias or has_bias,
            qk_norm=family.qk_norm,
            ffn_size=raw["intermediate_size"],
            max_context=context,
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            init_std=raw.get("initializer_range", 0.02),
            **rope,
        )
        vocab_size = raw["vocab_size"]
        scales, scale_notes = _read_scales(path, raw, model, query_scale)
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
    return SourceConfig(
        model,
        vocab_size,
        raw,
        family,
        output_bias=has_bias,
        scales=scales,
        notes=(*notes, *window_notes, *scale_notes),
    )


def _family_of(path: Path, folder: Path, raw: dict[str, Any]) -> Family:
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else named
    if isinstance(architecture, str) and architecture in FAMILIES:
        family = FAMILIES[architecture]
        ropes = raw.get("no_rope_layers")
        if family.model_type == "smollm3" and not (isinstance(ropes, list) and all(ropes)):
            raise CheckpointError(
                f"{path}: no_rope_layers leaves rotary positions out of some layers, the policy has them in all"
            )
        return family
    why = next((plan for part, plan in _PLANS.items() if part in str(architecture)), None)
    if why:
        raise CheckpointError(f"{path}: architecture {architecture!r} is not supported: {why}")
    raise CheckpointError(
        f"{path}: architecture {architecture!r} is not supported; supported: {', '.join(FAMILIES)}"
    )


def _read_context(path: Path, raw: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Longest context in which every layer sees all of it."""
    context, window = _number(path, raw, "max_position_embeddings", 2048), raw.get("sliding_window")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(k not in ("full_attention", "sliding_attention") for k in kinds):
        raise CheckpointError(f"{path}: layer_types other than full and sliding attention are not supported")
    slides = "sliding_attention" in kinds if kinds else raw.get("use_sliding_window", True)
    if not slides or not isinstance(window, int) or window >= context:
        return context, ()
    return window, (
        f"context {context:,} -> {window:,}: beyond it its attention slides, the policy's does not",
    )


def _read_rope(path: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], float, tuple[str, ...]]:
    """Settings of the rotary positions, a factor of the attention's logits, and notes.

    Both spellings are read: rope_theta beside rope_scaling, and rope_parameters since transformers 5.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    supported = ("default", "llama3", "linear", "yarn", "dynamic")
    if kind not in supported or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(
            f"{path}: rope scaling {kind or rope!r} is not supported; supported: {', '.join(supported)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor is not supported; it must be 1.0")
    base = {"rope_base": rope.get("rope_theta", raw.get("rope_theta", 10000.0))}
    if kind == "default":
        return base, 1.0, ()
    if kind == "dynamic":
        return (
            base,
            1.0,
            ("dynamic rope: static up to max_position_embeddings, which is as far as it goes here",),
        )
    base |= {"rope_scaling": kind, "rope_factor": _number(path, rope, "factor")}
    if kind == "linear":
        return base, 1.0, ()
    original = rope.get("original_max_position_embeddings")
    if kind == "llama3":
        return base | {
            "rope_low_freq_factor": rope["low_freq_factor"],
            "rope_high_freq_factor": rope["high_freq_factor"],
            "rope_original_context": rope["original_max_position_embeddings"],
        }, 1.0, ()  # fmt: skip
    if rope.get("truncate") is False:
        raise CheckpointError(f"{path}: yarn with truncate=false is not supported")
    base |= {
        "rope_beta_fast": rope.get("beta_fast") or 32.0,
        "rope_beta_slow": rope.get("beta_slow") or 1.0,
        "rope_original_context": original or raw["max_position_embeddings"],
    }
    factor = _yarn_attention(path, rope)
    return base, factor**2, ()


def _yarn_attention(path: Path, rope: Mapping[str, Any]) -> float:
    """What YaRN multiplies queries and keys by (arXiv 2309.00071, section 3.4, and DeepSeek's two scales)."""
    if rope.get("attention_factor") is not None:
        return _number(path, rope, "attention_factor")
    longer = math.log(max(1.0, _number(path, rope, "factor")))

    def scale(weight: float) -> float:
        return 0.1 * weight * longer + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(_number(path, rope, "mscale")) / scale(_number(path, rope, "mscale_all_dim"))
    return scale(1.0)


def _number(path: Path, values: Mapping[str, Any], name: str, default: float | None = None) -> Any:
    """A number above 0 of a config; `default` where there is none. Raises CheckpointError; KeyError without one."""
    value = values[name] if default is None else values.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
        raise CheckpointError(f"{path}: {name}={value!r:.40} must be a number above 0")
    return value


def _read_scales(
    path: Path, raw: dict[str, Any], model: ModelConfig, query_scale: float
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Factors that go into weights: YaRN's of the attention, and Granite's four multipliers."""
    query_scale *= (
        _number(path, raw, "attention_multiplier", model.kv_channels**-0.5) * model.kv_channels**0.5
    )
    embedding, residual = (
        _number(path, raw, f"{name}_multiplier", 1.0) for name in ("embedding", "residual")
    )
    logits = 1.0 / _number(path, raw, "logits_scaling", 1.0)
    if model.tie_embeddings:
        logits /= embedding  # the head is the embedding, with its factor
    queries = ("q_norm.weight",) if model.qk_norm else ("q_proj.weight", "q_proj.bias")
    scales = dict.fromkeys(queries, query_scale) | {
        "embed_tokens.weight": embedding,
        "o_proj.weight": residual,
        "down_proj.weight": residual,
        "model.norm.weight": logits,
    }
    scales = {name: factor for name, factor in scales.items() if not math.isclose(factor, 1.0, rel_tol=1e-9)}
    if not scales:
        return {}, ()
    named = ", ".join(f"{name.removesuffix('.weight')} x {factor:.6g}" for name, factor in scales.items())
    return scales, (f"what it multiplies by beside its weights goes into them, in fp32: {named}",)


def config_json(
    model: ModelConfig,
    vocab_size: int,
    *,
    bos_id: int | None,
    eos_id: int | list[int],
    dtype: str,
) -> dict[str, Any]:
    """A `config.json` that transformers 4 and 5 read; dtype in torch's words ("float32").

    Raises:
        CheckpointError: no family has this model's parts.
    """
    parts = model.qkv_bias, model.qk_norm
    named = [
        name
        for name, family in FAMILIES.items()
        if family.written and (family.qkv_bias, family.qk_norm) == parts
    ]
    if not named:
        raise CheckpointError(
            "no supported family has both qkv_bias and qk_norm: this model cannot be exported"
        )
    return {
        "architectures": named,
        "model_type": FAMILIES[named[0]].model_type,
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
        "rope_scaling": _rope_json(model),
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


def _rope_json(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_factor == 1:
        return None
    rope: dict[str, Any] = {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling == "llama3":
        rope["low_freq_factor"] = model.rope_low_freq_factor
        rope["high_freq_factor"] = model.rope_high_freq_factor
    if model.rope_scaling == "yarn":
        rope |= {"beta_fast": model.rope_beta_fast, "beta_slow": model.rope_beta_slow}
        rope["attention_factor"] = 1.0  # it is in the weights
    if model.rope_scaling != "linear":
        rope["original_max_position_embeddings"] = model.rope_original_context
    return rope
