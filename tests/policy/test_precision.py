"""Number formats: what FP8 asks Megatron for, and that it is refused where it cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SMALL_MODEL

from sip_engine.config.model import ModelConfig
from sip_engine.config.schema import ParallelConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.policy import precision
from sip_engine.policy.checkpoint import sharded_model
from sip_engine.policy.layers import SharedPrefixAttention, block_spec, submodules_of
from sip_engine.policy.model import build_model, transformer_config
from sip_engine.policy.precision import check_precision, fp8_settings, multiplies_bf16, parameter_dtype
from sip_engine.utils.errors import ConfigError


def fp8_model(**changes: Any) -> ModelConfig:
    shape = {"hidden_size": 64, "ffn_size": 96, "head_dim": 16}
    return ModelConfig.model_validate(SMALL_MODEL.model_dump() | {"precision": "fp8"} | shape | changes)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Transformer Engine and a Hopper GPU were here; nothing of either is run."""
    monkeypatch.setattr(precision, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def test_fp8_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'Engine is not installed; set model\.precision="bf16"'):
        check_precision(fp8_model(), ParallelConfig())
    monkeypatch.setattr(precision, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="there is no CUDA device"):
        check_precision(fp8_model(), ParallelConfig())


def test_fp8_needs_hopper(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_precision(fp8_model(), ParallelConfig())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"compute capability 8.0, below 9.0"):
        check_precision(fp8_model(), ParallelConfig())


def test_fp8_widths_are_checked_for_each_process(hopper: None) -> None:
    check_precision(fp8_model(), ParallelConfig(tensor=2))
    with pytest.raises(ConfigError, match="ffn_size is 24 on each of 4"):
        check_precision(fp8_model(num_kv_heads=4), ParallelConfig(tensor=4))


@pytest.mark.parametrize(
    ("fp8", "want"),
    [
        ({"recipe": "delayed"}, ("hybrid", "delayed", False, 1024)),
        ({"recipe": "current"}, ("hybrid", "tensorwise", False, 1)),
        ({"recipe": "current", "bf16_ends": True}, ("hybrid", "tensorwise", True, 1)),
        ({"recipe": "blockwise"}, ("e4m3", "blockwise", False, 1)),
    ],
)
def test_recipes_reach_megatron(fp8: dict[str, Any], want: tuple) -> None:
    config = transformer_config(fp8_model(fp8=fp8), ParallelConfig())
    found = (config.fp8, config.fp8_recipe, config.first_last_layers_bf16, config.fp8_amax_history_len)
    assert found == want
    assert config.params_dtype is torch.bfloat16 and config.bf16
    if config.first_last_layers_bf16:
        assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 1)
    assert fp8_settings(fp8_model(precision="bf16", fp8=fp8)) == {}


def test_delayed_scaling_has_no_bf16_ends() -> None:
    with pytest.raises(ValueError, match='choose "current" or "blockwise"'):
        fp8_model(fp8={"recipe": "delayed", "bf16_ends": True})


def test_matrices_are_transformer_engines_in_fp8_only() -> None:
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.tensor_parallel import ColumnParallelLinear

    for chosen, column in (("fp8", te.TEColumnParallelLinear), ("bf16", ColumnParallelLinear)):
        config = transformer_config(fp8_model(precision=chosen), ParallelConfig())
        block: Any = block_spec(config, 2)
        layer = block.layer_specs[0].submodules
        attention, mlp = submodules_of(layer.self_attention), submodules_of(layer.mlp)
        assert attention.linear_qkv is mlp.linear_fc1 is column
        assert attention.linear_proj is mlp.linear_fc2
        assert attention.core_attention.module is SharedPrefixAttention


def test_a_checkpoint_of_an_fp8_run_is_read_anywhere() -> None:
    assert fp8_model().without_fp8().precision == "auto"
    assert fp8_model(precision="bf16").without_fp8().precision == "bf16"
    assert parameter_dtype("fp8") is torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"arm_bf16": True}, True),
        ({"avx512_bf16": False, "avx2": True, "amx_bf16": False}, False),
        ({}, False),
    ],
)
def test_bf16_is_fast_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bf16() == fast
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert multiplies_bf16()


def test_fp8_layers_hold_the_parameters_of_bf16_ones(mesh: Mesh) -> None:
    """Names, shapes, values and checkpoint keys: the sampler, the exporter and checkpoints see no difference."""
    pytest.importorskip("transformer_engine")
    if not torch.cuda.is_available():
        pytest.skip("Transformer Engine's layers need CUDA")
    found = []
    for chosen in ("bf16", "fp8"):
        model = build_model(fp8_model(precision=chosen), ParallelConfig(), 101, mesh, seed=3)
        parameters = {name: (p.dtype, p.float().cpu()) for name, p in model.named_parameters()}
        found.append((parameters, set(sharded_model(model, "model."))))
    (plain, plain_keys), (fp8, fp8_keys) = found
    assert plain.keys() == fp8.keys() and plain_keys == fp8_keys
    assert all(plain[n][0] == fp8[n][0] and torch.equal(plain[n][1], fp8[n][1]) for n in plain)


def test_an_unknown_setting_of_the_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIP_KERNELS", "fast")
    with pytest.raises(ConfigError, match="SIP_KERNELS is 'fast': set it to one of auto, reference"):
        check_precision(SMALL_MODEL, ParallelConfig())
