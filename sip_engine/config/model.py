"""[model]: the shape of the policy and the numbers it computes in."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sip_engine.config.section import Positive, Section


class Fp8Config(Section):
    """How Transformer Engine scales FP8 matrices; read with precision = "fp8" only."""

    recipe: Literal["delayed", "current", "blockwise"] = "current"
    """delayed: scales from earlier steps; current: of the tensor itself; blockwise: one for 128 x 128 or 1 x 128."""
    bf16_ends: bool = False
    """Compute the first and the last layer in bf16."""

    @model_validator(mode="after")
    def _delayed_everywhere(self) -> Fp8Config:
        if self.bf16_ends and self.recipe == "delayed":
            raise ValueError('bf16_ends does not go with recipe="delayed": choose "current" or "blockwise"')
        return self


class ModelConfig(Section):
    """A Llama-like decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    num_layers: Annotated[int, Field(gt=0, le=10_000)] = 4
    """Transformer layers."""
    hidden_size: Positive = 128
    """Width of the residual stream."""
    num_heads: Positive = 4
    """Query heads."""
    num_kv_heads: Positive = 2
    """Key/value heads; divides `num_heads`."""
    head_dim: Positive | None = None
    """Channels of a head; unset is hidden_size / num_heads."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values, as Qwen2 does."""
    qk_norm: bool = False
    """RMSNorm over the channels of each query and key head, as in Qwen3."""
    ffn_size: Positive = 352
    """Inner width of the SwiGLU block."""
    max_context: Positive = 2048
    """Longest prefix plus suffix, in tokens."""
    rope_base: float = Field(default=10000.0, gt=0)
    """Base of the rotary wavelengths."""
    rope_factor: float = Field(default=1.0, ge=1)
    """Stretch rotary wavelengths beyond the original context by this, as `rope_scaling` says; 1 leaves them."""
    rope_scaling: Literal["llama3", "linear", "yarn"] = "llama3"
    """llama3: long wavelengths, as Llama 3.1 does; linear: all of them; yarn: those that turn rarely (2309.00071)."""
    rope_low_freq_factor: float = Field(default=1.0, gt=0)
    """Wavelengths above rope_original_context / this are stretched in full."""
    rope_high_freq_factor: float = Field(default=4.0, gt=0)
    """Wavelengths below rope_original_context / this are left as they are; in between the two are blended."""
    rope_original_context: Positive = 8192
    """Context that the stretched model was first trained for, in tokens."""
    rope_beta_fast: float = Field(default=32.0, gt=0)
    """yarn: channels that turn more often than this in the original context are left as they are."""
    rope_beta_slow: float = Field(default=1.0, gt=0)
    """yarn: channels that turn less often than this are stretched in full."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon inside RMSNorm."""
    tie_embeddings: bool = False
    """Share the input embedding with the output head."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """auto is bf16 on CUDA and fp32 on the CPU; fp8 computes matrices of bf16 parameters in FP8, on Hopper GPUs.
    Whatever it is, the optimizer's master weights and both Adam moments are fp32."""
    fp8: Fp8Config = Fp8Config()
    attention: Literal["auto", "triton", "flash", "reference"] = "auto"
    """Who computes attention. auto: on CUDA by shape, ours or flash-attn where that is installed; triton: ours;
    flash: flash-attn in training and for reading prefixes, ours in decoding; reference: plain torch, slow."""

    @field_validator("head_dim")
    @classmethod
    def _unset_if_usual(cls, value: int | None, info: ValidationInfo) -> int | None:
        """One way to say one thing, so that settings of the same model compare equal."""
        hidden, heads = info.data.get("hidden_size"), info.data.get("num_heads")
        return None if value and heads and hidden == value * heads else value

    def without_fp8(self) -> ModelConfig:
        """The same model to be read rather than trained, which any machine can do."""
        precision = "auto" if self.precision == "fp8" else self.precision
        return self.model_copy(update={"precision": precision, "attention": "auto"})

    @property
    def kv_channels(self) -> int:
        """Channels of a head, whether set or derived."""
        return self.head_dim or self.hidden_size // self.num_heads

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.kv_channels % 2:
            name = "hidden_size / num_heads" if self.head_dim is None else "head_dim"
            raise ValueError(f"{name} must be even: rotary positions turn pairs of channels")
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise ValueError(
                f"rope_low_freq_factor={self.rope_low_freq_factor} must be below "
                f"rope_high_freq_factor={self.rope_high_freq_factor}"
            )
        return self
