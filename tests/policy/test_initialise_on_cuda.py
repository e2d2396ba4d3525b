"""Initial weights on CUDA are drawn there: each process its own part of matrices that no layout changes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL
from emulated_cuda import emulated_cuda
from scipy import stats

from sip_engine.config.schema import ParallelConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.policy import initialise as module
from sip_engine.policy.initialise import initialise
from sip_engine.policy.model import build_model

VOCAB, SHAPES = (
    90,
    {"embedding.word_embeddings": (96, 8), "mlp.linear_fc1": (24, 8), "mlp.linear_fc2": (8, 12)},
)


def drawn(rank: int = 0, size: int = 1, *, first_layer: int = 0, layer: int = 0) -> dict[str, torch.Tensor]:
    """A shard's parameters, drawn as on CUDA: the same counters give the same bits on the CPU."""
    model, dims = (
        torch.nn.Module(),
        {"embedding.word_embeddings": 0, "mlp.linear_fc1": 0, "mlp.linear_fc2": 1},
    )
    found = {}
    for name, shape in SHAPES.items():
        shape = tuple(n // size if i == dims[name] else n for i, n in enumerate(shape))
        parameter = torch.nn.Parameter(torch.full(shape, torch.nan))
        parameter.partition_dim = dims[name]  # type: ignore[attr-defined]
        full = f"{name}.weight" if name.startswith("embedding") else f"decoder.layers.{layer}.{name}.weight"
        found[full] = parameter
    model.named_parameters = lambda: iter(found.items())  # type: ignore[method-assign, assignment]
    axis = SimpleNamespace(rank=rank, size=size)
    options = {"std": 0.02, "num_layers": 2, "vocab_size": VOCAB, "tied": False}
    initialise(model, axis, seed=3, first_layer=first_layer, **options)  # type: ignore[arg-type]
    return {name: parameter.detach() for name, parameter in found.items()}


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "draws_on", lambda _: True)


def test_shards_are_parts_of_one_matrix(counters: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn()
    monkeypatch.setattr(module, "CHUNK", 16)  # rows two at a time give the same
    parts = [drawn(rank, 2) for rank in range(2)]
    embedding, gate_up, down = whole
    assert torch.equal(torch.cat([part[embedding] for part in parts]), whole[embedding])
    assert torch.equal(torch.cat([part[down] for part in parts], 1), whole[down])
    halves = [part[gate_up].chunk(2) for part in parts]  # each shard: its gate rows, then its up rows
    assert torch.equal(torch.cat([halves[0][0], halves[1][0], halves[0][1], halves[1][1]]), whole[gate_up])
    assert (whole[embedding][VOCAB:] == 0).all() and (whole[embedding][:VOCAB] != 0).all()
    later = drawn(first_layer=1)
    assert torch.equal(later[down], drawn(layer=1)["decoder.layers.1.mlp.linear_fc2.weight"])
    assert not torch.equal(later[down], whole[down])


def test_they_are_normal_and_not_correlated(counters: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "mlp.linear_fc1", (400, 500))
    values = drawn()["decoder.layers.0.mlp.linear_fc1.weight"].double().numpy() / 0.02
    assert stats.kstest(values.ravel(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("own_weights", [True, False])
def test_nothing_is_drawn_on_the_host(mesh: Mesh, own_weights: bool) -> None:
    """It would have to be copied, as the weights are that the other tests compare with the CPU's."""
    with emulated_cuda(own_weights=own_weights) as cuda:
        device = start_mesh()
        with cuda.watch() as seen:
            model = build_model(SMALL_MODEL, ParallelConfig(), VOCAB, device, seed=1)
        assert any("initialise" in place for place in seen.places["upload"]) != own_weights
        weight = model.get_parameter("decoder.layers.0.mlp.linear_fc1.weight")
        assert 0.9 < float(weight.detach().std()) / SMALL_MODEL.init_std < 1.1
