"""Decoding from FP8 weights: near a trainer that computes so, from the weights of now, and on the device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL
from emulated_cuda import emulated_cuda
from test_sampler_on_cuda import assert_same, launches_of_a_step

from benchmarks.fp8_drift import drift
from sip_engine.config.schema import ParallelConfig, SamplerConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.kernels.fp8_linear import Recipe
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler

VOCAB = 90
MODEL = SMALL_MODEL.model_copy(
    update={
        "precision": "fp32",
        "hidden_size": 64,
        "head_dim": 16,
        "ffn_size": 144,
        "init_std": 0.3,
        "qkv_bias": True,
    }
)
RECIPES: tuple[Recipe, ...] = ("current", "blockwise")
PARAMS = SamplingParams(4, seed=2)


def small_model(mesh: Mesh, num_layers: int = 2) -> PolicyModel:
    shape = MODEL.model_copy(update={"num_layers": num_layers})
    model = build_model(shape, ParallelConfig(), VOCAB, mesh, seed=1).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first
            parameter.copy_(torch.linspace(-1, 1, len(parameter), device="cpu"))
    return model


def requests(n: int = 4) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(rng.integers(0, VOCAB, size).astype(np.int32), n, size) for size in (9, 20)]


def sampler_of(model: PolicyModel, mesh: Mesh, recipe: Recipe | None) -> Sampler:
    views = weight_views(model, VOCAB, 0)
    views = replace(views, fp8=(recipe,) * len(views.layers))
    return Sampler(views, mesh, SamplerConfig(kv_memory_mb=1, page_size=4))


def test_drift_from_a_blockwise_trainer_is_that_of_two_equal_computations(mesh: Mesh) -> None:
    """Both operands are rounded alike; where sums differ in the last bit a value may round apart."""
    model = small_model(mesh)
    plain = drift(model, mesh, None, None, requests()).mean()
    apart = drift(model, mesh, "blockwise", None, requests()).mean()
    beside = drift(model, mesh, "blockwise", "blockwise", requests()).mean()
    assert plain < 1e-5 and apart > 0.02
    assert beside < 0.05 * apart


def test_weights_rounded_alike_take_their_share_of_the_drift_away(mesh: Mesh) -> None:
    """Per-tensor scaling: activations are not quantised here, and their share stays."""
    model = small_model(mesh)
    apart, beside = (
        drift(model, mesh, "current", sampled, requests()).mean() for sampled in (None, "current")
    )
    assert 0.1 * apart < beside < 0.9 * apart


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_device_draws_the_cpus_tokens_from_the_weights_of_now(mesh: Mesh, recipe: Recipe) -> None:
    """By graphs whose buffers stay, after an update of the parameters too."""
    on_cpu = small_model(mesh, 1)
    with emulated_cuda() as cuda:
        on_device = start_mesh()
        model = small_model(on_device, 1)
        sampler, twin = sampler_of(model, on_device, recipe), sampler_of(on_cpu, mesh, recipe)
        first = twin.generate(requests(1), PARAMS)
        assert_same(sampler.generate(requests(1), PARAMS), first)
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), on_cpu.parameters(), strict=True):
                ours.mul_(0.8)
                theirs.mul_(0.8)
        with cuda.watch() as seen:
            second = sampler.generate(requests(1), PARAMS)
        assert seen["replay"] == PARAMS.max_new_tokens - 1
        assert seen["synchronise"] == 2, seen.places["synchronise"]
        fresh = sampler_of(on_cpu, mesh, recipe)  # which knows no older weights
        assert_same(second, fresh.generate(requests(1), PARAMS))
    assert [c.logprobs.tolist() for g in first for c in g] != [c.logprobs.tolist() for g in second for c in g]


def test_no_launch_is_added_to_a_layer(mesh: Mesh) -> None:
    with emulated_cuda() as cuda:
        assert (
            launches_of_a_step(cuda, 2, fp8="blockwise") - launches_of_a_step(cuda, 1, fp8="blockwise") == 10
        )


def test_only_layers_that_the_trainer_quantises_are_quantised(mesh: Mesh) -> None:
    model = small_model(mesh)
    assert weight_views(model, VOCAB, 0).fp8 == (None, None)
    config = model.config
    config.fp8, config.fp8_recipe = "hybrid", "tensorwise"
    assert weight_views(model, VOCAB, 0).fp8 == ("current", "current")
    config.first_last_layers_bf16 = True
    assert weight_views(model, VOCAB, 0).fp8 == (None, None)
    config.num_layers = 3
    views = weight_views(model, VOCAB, 0)
    assert views.fp8 == (None, "current")
    sampler = Sampler(views, mesh, SamplerConfig(kv_memory_mb=1))
    assert (
        sampler.fp8 is not None and sampler.fp8.of(0, "qkv") is None and sampler.fp8.of(1, "qkv") is not None
    )
    matrices = sum(
        getattr(views.layers[1], name).numel() for name in ("qkv", "attention_out", "gate_up", "down")
    )
    assert sampler.fp8.num_bytes == matrices + 4 * 4
    config.fp8_recipe = "delayed"
    views = weight_views(model, VOCAB, 0)
    assert views.fp8 == (None, None) and not Sampler(views, mesh, SamplerConfig(kv_memory_mb=1)).fp8
    config.fp8_recipe = "blockwise"
    views = weight_views(model, VOCAB, 0)
    for off in ({"fp8_weights": "off"}, {"batch_invariant": True}):
        assert Sampler(views, mesh, SamplerConfig(kv_memory_mb=1, **off)).fp8 is None  # pyright: ignore[reportArgumentType]
