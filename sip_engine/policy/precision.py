"""Number formats: the type of parameters, and whether this machine can do FP8."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from sip_engine.config.model import ModelConfig
from sip_engine.config.schema import ParallelConfig
from sip_engine.kernels._flash_attn import why_not
from sip_engine.kernels._impl import SETTINGS, SWITCH
from sip_engine.kernels.fp8_linear import Recipe
from sip_engine.kernels.shared_prefix_attention import MAX_HEAD_DIM
from sip_engine.utils.errors import ConfigError

FP8_MULTIPLE = 16
"""FP8 GEMMs want every dimension to be a multiple of this: tokens are padded to it, widths are checked."""

FP8_BLOCK = 128
"""The side of a blockwise recipe's blocks, which cut both dimensions of a matrix evenly."""

_RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise"}
_FROM_VALUES: dict[str, Recipe] = {"tensorwise": "current", "blockwise": "blockwise"}


def parameter_dtype(precision: str) -> torch.dtype:
    """The type of parameters and activations for a precision setting; FP8 keeps bf16 parameters."""
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}[precision]


def multiplies_bf16() -> bool:
    """Whether this machine multiplies bf16 faster than fp32: with CUDA, or instructions for it in the processor."""
    if torch.cuda.is_available():
        return True
    ask = getattr(torch.cpu, "get_capabilities", dict)  # not in every torch that is supported
    return any(there for name, there in ask().items() if name.endswith("bf16"))


def fp8_settings(model: ModelConfig) -> dict[str, Any]:
    """The FP8 part of Megatron's configuration; empty in other precisions."""
    if model.precision != "fp8":
        return {}
    settings: dict[str, Any] = {
        "fp8": "e4m3" if model.fp8.recipe == "blockwise" else "hybrid",
        "fp8_recipe": _RECIPES[model.fp8.recipe],
        "first_last_layers_bf16": model.fp8.bf16_ends,
    }
    if model.fp8.bf16_ends:
        settings |= {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
    if model.fp8.recipe == "delayed":
        settings |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return settings


def fp8_recipes(config: TransformerConfig, layers: Sequence[int]) -> tuple[Recipe | None, ...]:
    """How each of these layers (numbers from 0 over all stages) quantises a matrix, as far as its values tell.

    Delayed scaling does so by what earlier steps have seen: None, as for layers that compute in bf16.
    """
    recipe = _FROM_VALUES.get(str(config.fp8_recipe)) if config.fp8 else None
    ends = (0, config.num_layers - 1) if config.first_last_layers_bf16 else ()
    return tuple(None if layer in ends else recipe for layer in layers)


def check_precision(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse what this machine cannot run, before anything is built.

    Raises:
        ConfigError: an unknown SIP_KERNELS, attention that cannot run here, heads too wide for it, no Transformer
            Engine, no Hopper GPU, or widths that FP8 does not take.
    """
    if os.environ.get(SWITCH, "auto") not in SETTINGS:
        raise ConfigError(
            f"the environment variable {SWITCH} is {os.environ[SWITCH]!r}: set it to one of "
            f"{', '.join(SETTINGS)}, or not at all"
        )
    _check_attention(model)
    if model.precision != "fp8":
        return
    missing = _missing_for_fp8()
    if missing:
        raise ConfigError(
            f'model.precision="fp8" needs Transformer Engine on a Hopper GPU, and {missing}; '
            'set model.precision="bf16", or install `transformer-engine[pytorch]` on an H100 machine'
        )
    widths = {
        "hidden_size": model.hidden_size // parallel.tensor,
        "ffn_size": model.ffn_size // parallel.tensor,
        "num_heads * head_dim": model.num_heads * model.kv_channels // parallel.tensor,
        "num_kv_heads * head_dim": model.num_kv_heads * model.kv_channels // parallel.tensor,
    }
    multiple = FP8_BLOCK if model.fp8.recipe == "blockwise" else FP8_MULTIPLE
    for name, width in widths.items():
        if width % multiple:
            raise ConfigError(
                f'model.precision="fp8": {name} is {width} on each of {parallel.tensor} tensor-parallel processes '
                f'and must be a multiple of {multiple}; change it or set model.precision="bf16"'
            )


def _check_attention(model: ModelConfig) -> None:
    on_cuda, plain = torch.cuda.is_available(), os.environ.get(SWITCH, "auto") == "reference"
    asked = f'model.attention="{model.attention}"'
    if model.attention in ("triton", "flash") and not on_cuda:
        raise ConfigError(f'{asked} needs a CUDA device: set model.attention="auto"')
    if model.attention in ("triton", "flash") and plain:
        raise ConfigError(f"{asked} and {SWITCH}=reference exclude each other: unset one")
    missing = why_not(model.kv_channels, parameter_dtype(model.precision))
    if model.attention == "flash" and missing:
        raise ConfigError(f"{asked}: {missing}")
    chosen_for_us = model.attention == "triton" or (model.attention == "auto" and not plain and bool(missing))
    if on_cuda and chosen_for_us and model.kv_channels > MAX_HEAD_DIM:
        raise ConfigError(
            f"model.head_dim is {model.kv_channels}: attention in training takes at most {MAX_HEAD_DIM} on CUDA; use "
            'more, smaller heads, flash-attn 2, or model.attention="reference", which is slow'
        )


def _missing_for_fp8() -> str | None:
    if find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (9, 0):
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, below 9.0"
    return None
