"""A plan's bytes and operations against those counted on CPU runs, within a tenth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from counting import Counted, count, setting
from ranks import run_ranks

from sip_engine.accounting import memory, work
from sip_engine.accounting.shape import Shape
from sip_engine.accounting.workload import workload_of
from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.model import padded_vocab_size

BASE = {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 192}
DATA = {"suffix_tokens": 24, "max_prefix_tokens": 96, "min_prefix_tokens": 96, "vocab_size": 700}
SHORT = DATA | {"max_prefix_tokens": 32, "min_prefix_tokens": 32, "vocab_size": 2000}
CLOSE = pytest.approx

ALONE = {
    "grouped heads": ({}, {}, DATA),
    "a key head a query head": ({"num_kv_heads": 4}, {}, DATA),
    "tied, norms on queries and keys": ({"tie_embeddings": True, "qk_norm": True}, {}, DATA),
    "biases": ({"qkv_bias": True}, {}, DATA),
    "wide heads, deep": ({"head_dim": 32, "num_layers": 6}, {}, DATA),
    "large vocabulary, short prefix": ({}, {}, SHORT),
    "SwiGLU again": ({}, {"recompute": "mlp"}, DATA),
    "all again": ({}, {"recompute": "full"}, DATA),
    "bf16": ({"precision": "bf16"}, {}, DATA),
    "bf16, gradients too, small micro-batches": (
        {"precision": "bf16"},
        {"distributed_optimizer": True, "micro_batch_tokens": 300, "grad_reduce": "parameters"},
        DATA,
    ),
}  # fmt: skip
ON_TWO = {
    "tensor": {"tensor": 2},
    "tensor, sequence, all again": {"tensor": 2, "sequence": True, "recompute": "full"},
    "pipeline": {"pipeline": 2, "micro_batch_tokens": 150},
    "data, optimizer sharded": {"distributed_optimizer": True},
}
assert len(ALONE) + len(ON_TWO) >= 12


def check_bytes(cfg: RunConfig, counted: Counted, shape: Shape, replicas: int, stage: int) -> None:
    parameters = shape.parameters(stage)
    assert counted.weights == parameters * shape.dtype_bytes
    # Megatron pads its buffers to whole shards.
    assert counted.gradients == CLOSE(memory.gradient_bytes(cfg, shape, parameters), rel=0.01)
    assert counted.optimizer == CLOSE(memory.optimizer_bytes(cfg, shape, parameters, replicas), rel=0.01)
    assert counted.reference == memory.reference_bytes(cfg, shape, parameters)
    assert counted.kv_token == shape.kv_bytes("auto")


def check_work(cfg: RunConfig, counted: Counted, shape: Shape, replicas: int) -> None:
    load = workload_of(cfg, replicas)
    prefill = work.prefill(shape, load.prefixes, load.prefix)
    decode = work.decode(shape, load.sequences, load.rollouts, load.prefix, load.suffix, "auto")
    assert counted.update_flops == CLOSE(work.update(cfg, shape, load).flops, rel=0.02)
    assert counted.reference_flops == CLOSE(work.reference(cfg, shape, load).flops, rel=0.02)
    assert counted.sampler_flops == CLOSE(prefill.flops + decode.flops, rel=0.02)
    assert counted.kv_read == CLOSE(decode.pieces[1].bytes, rel=0.001)


def check_activations(cfg: RunConfig, counted: Counted, shape: Shape, replicas: int) -> None:
    load = workload_of(cfg, replicas)
    tokens = load.prefixes / memory.num_micro_batches(cfg, load) * load.longest_row
    expected = memory.activation_bytes(cfg, shape, tokens, tokens * load.scored / load.row, 1, "cpu")
    assert counted.activations == CLOSE(expected, rel=0.05)


@pytest.mark.parametrize("name", ALONE)
def test_one_process(name: str, mesh: Mesh) -> None:
    model, parallel, data = ALONE[name]
    cfg = setting(BASE | model, parallel, data=data)
    shape, counted = Shape(cfg.model, cfg.parallel, cfg.data.vocab_size), count(cfg, mesh)
    check_bytes(cfg, counted, shape, 1, 0)
    check_work(cfg, counted, shape, 1)
    check_activations(cfg, counted, shape, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TWO)
def test_two_processes(name: str, tmp_path: Path) -> None:
    """Bytes put into collectives are counted too. Work is the last stage's, which has the head."""
    cfg = setting(BASE, ON_TWO[name], data=DATA)
    parallel = cfg.parallel
    replicas = 2 // (parallel.tensor * parallel.pipeline)
    shape = Shape(cfg.model, parallel, cfg.data.vocab_size)
    run_ranks("counting:count_on_ranks", 2, tmp_path, cfg.model_dump_json())
    ranks = [Counted(**json.loads((tmp_path / f"counted-{rank}.json").read_text())) for rank in range(2)]
    for rank, counted in enumerate(ranks):
        check_bytes(cfg, counted, shape, replicas, rank if parallel.pipeline == 2 else 0)
    check_work(cfg, ranks[1], shape, replicas)
    if parallel.pipeline == 1:
        check_activations(cfg, ranks[1], shape, replicas)
    check_collectives(cfg, ranks[1], shape, replicas)


def check_collectives(cfg: RunConfig, counted: Counted, shape: Shape, replicas: int) -> None:
    load, training = workload_of(cfg, replicas), counted.forward_backward_collectives
    expected: dict[str, float] = {}
    for call in (
        *work.update(cfg, shape, load).collectives,
        *work.communication(cfg, shape, replicas).collectives,
    ):
        expected[call.kind] = expected.get(call.kind, 0.0) + call.bytes
    gathered = counted.gradient_collectives.get("allgather_into_tensor_coalesced", 0)
    found = {
        "all_gather": training.get("allgather_base", 0) + gathered,
        "reduce_scatter": training.get("reduce_scatter_base", 0),
        "send": training.get("send", 0) + training.get("recv", 0),
    }
    # A replica alone "reduces" its gradients too, over nobody.
    alone = replicas == 1
    found["all_reduce"] = training.get("allreduce", 0) + (
        0 if alone else training.get("allreduce_coalesced", 0)
    )
    found["reduce_scatter"] += 0 if alone else training.get("reduce_scatter_tensor_coalesced", 0)
    for kind, size in expected.items():
        assert found[kind] == CLOSE(size, rel=0.01), kind
    assert sum(found.values()) == CLOSE(sum(expected.values()), rel=0.01)


@pytest.mark.parametrize(("vocab", "tensor"), [(1, 1), (32000, 1), (32001, 2), (50257, 4), (128256, 8)])
def test_vocabulary_is_padded_as_the_policy_pads_it(vocab: int, tensor: int) -> None:
    cfg = setting(
        {"num_heads": 8, "num_kv_heads": 8, "hidden_size": 64, "ffn_size": 64}, {"tensor": tensor}, data=DATA
    )
    assert Shape(cfg.model, cfg.parallel, vocab).padded_vocab == padded_vocab_size(vocab, tensor)
