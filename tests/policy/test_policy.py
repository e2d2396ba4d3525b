"""The policy's log-probs, gradients and updates against transformers' Llama with the same weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, small_run
from hypothesis import given
from hypothesis import strategies as st
from llama import llama_logprobs, llama_of
from made_choices import VOCAB, choices, random_ids

from sip_engine.config.model import ModelConfig
from sip_engine.config.schema import ObjectiveConfig, ParallelConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.model import build_model
from sip_engine.policy.packing import pack_rows, split_by_tokens
from sip_engine.policy.policy import Policy, score
from sip_engine.policy.reference import Reference
from sip_engine.policy.rows import LossSums, Row, documents_of
from sip_engine.policy.weights import weight_views
from sip_engine.types import Choice, Sample
from sip_engine.utils.errors import NonFiniteError


def random_rows(seed: int, shapes: list[tuple[int, tuple[int, ...]]]) -> list[Row]:
    rng = np.random.default_rng(seed)

    def ids(n: int) -> np.ndarray:
        return rng.integers(0, VOCAB, n).astype(np.int32)

    return [Row(ids(prefix), tuple(ids(n) for n in suffixes)) for prefix, suffixes in shapes]


RAGGED = [(7, (5, 3)), (1, (1,)), (20, (4, 4, 9)), (3, (12,))]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_logprobs_equal_llama(mesh: Mesh, num_kv_heads: int, tied: bool) -> None:
    shape = SMALL_MODEL.model_dump() | {"num_kv_heads": num_kv_heads, "tie_embeddings": tied}
    model = build_model(ModelConfig(**shape), ParallelConfig(), VOCAB, mesh, seed=3)
    llama = llama_of(model, VOCAB)
    rows = random_rows(0, RAGGED)
    got = score(model, [pack_rows(rows, mesh.device)])[0]
    with torch.no_grad():
        want = torch.cat(
            [llama_logprobs(llama, r.prefix.tolist(), s.tolist()) for r in rows for s in r.suffixes]
        )
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_an_empty_prefix_scores_from_the_second_token(mesh: Mesh) -> None:
    model = build_model(SMALL_MODEL, ParallelConfig(), VOCAB, mesh, seed=3)
    (row,) = random_rows(1, [(0, (9,))])
    got = score(model, [pack_rows([row], mesh.device)])[0]
    ids = row.suffixes[0].tolist()
    with torch.no_grad():
        want = llama_logprobs(llama_of(model, VOCAB), ids[:1], ids[1:])
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_shared_prefix_gradients_equal_separate_sequences(mesh: Mesh) -> None:
    """Float64: one packed stream against one Llama pass a sequence, every parameter's gradient."""
    model = build_model(SMALL_MODEL, ParallelConfig(), VOCAB, mesh, seed=5).double()
    llama = llama_of(model, VOCAB)
    rows = random_rows(2, RAGGED)
    packed = pack_rows(rows, mesh.device)
    weights = torch.linspace(-1, 1, len(packed.targets), dtype=torch.float64)
    from sip_engine.distributed.megatron_cpu import megatron_device

    with megatron_device():
        (model(packed) * weights).sum().backward()
    logprobs = [llama_logprobs(llama, r.prefix.tolist(), s.tolist()) for r in rows for s in r.suffixes]
    (torch.cat(logprobs) * weights).sum().backward()

    with torch.no_grad():  # lay Llama's gradients out like ours, through the same conversion
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    ours = llama_of(model, VOCAB)
    for (name, got), (_, want) in zip(ours.named_parameters(), llama.named_parameters(), strict=True):
        assert want.grad is not None
        scale = want.grad.abs().max()
        torch.testing.assert_close(got, want.grad, atol=1e-6 * float(scale), rtol=0, msg=name)


EPS = 1e-4  # large, so that Adam does not blow the rounding of tiny gradients up to whole steps


NLL = open_objective(ObjectiveConfig(kind="rf_nll"))


def best_of(made: list[Choice]) -> list[Row]:
    """The chosen ones alone, as RF-NLL trains on them."""
    return [NLL.row_of_choice(replace(choice, rejected=None)) for choice in made]


@pytest.mark.parametrize(
    ("settings", "micro_batch_tokens"),
    [({}, 4096), ({}, 25), ({"length_normalised": True}, 30), ({"nll_weight": 0.3}, 40)],
)
def test_dpo_updates_equal_plain_torch(mesh: Mesh, settings: dict, micro_batch_tokens: int) -> None:
    """Three updates against Llama, a written-out DPO loss and torch's own AdamW and gradient clipping."""
    objective = open_objective(ObjectiveConfig(kind="dpo", beta=0.3, **settings))
    cfg = small_run(
        parallel={"micro_batch_tokens": micro_batch_tokens},
        optimizer={
            "lr": 1e-3,
            "warmup_steps": 0,
            "min_lr_ratio": 1.0,
            "weight_decay": 0.0,
            "clip_grad": 0.5,
            "eps": EPS,
        },
    )
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    llama, frozen = llama_of(policy.model, VOCAB), llama_of(policy.model, VOCAB)
    adam = torch.optim.AdamW(llama.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)
    for step in range(3):
        batch = choices(step, 5)
        stats = update(policy, reference, [objective.row_of_choice(c) for c in batch], objective)
        loss = plain_dpo(llama, frozen, batch, objective.cfg)
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), 0.5)
        adam.step()
        assert stats.loss == pytest.approx(loss.item(), abs=2e-5)
        assert stats.grad_norm == pytest.approx(norm.item(), rel=2e-4)
    for (name, got), (_, want) in zip(
        llama_of(policy.model, VOCAB).named_parameters(), llama.named_parameters(), strict=True
    ):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=0, msg=name)


def plain_dpo(llama, frozen, batch: list[Choice], cfg: ObjectiveConfig) -> torch.Tensor:
    losses = []
    for choice in batch:
        prefix = choice.sample.prefix_ids.tolist()
        gains, nll = [], torch.tensor(0.0)
        for place, candidate in enumerate(choice.trained()):
            ids = candidate.ids.tolist()
            mine = llama_logprobs(llama, prefix, ids)
            with torch.no_grad():
                theirs = llama_logprobs(frozen, prefix, ids)
            size = len(ids) if cfg.length_normalised else 1
            gains.append((mine.double().sum() - theirs.double().sum()) / size)
            nll = -mine.mean() if place == 0 else nll
        margin = cfg.beta * (gains[0] - gains[1])
        losses.append(torch.log1p(torch.exp(-margin)) + cfg.nll_weight * nll)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("loss_on", ["all", "suffix"])
def test_next_token_loss_equals_plain_torch(mesh: Mesh, loss_on: str) -> None:
    cfg = small_run()
    policy = Policy(cfg, VOCAB, mesh)
    llama = llama_of(policy.model, VOCAB)
    rng = np.random.default_rng(0)
    samples = [Sample(n, 0, random_ids(rng, 5 + n), random_ids(rng, 6), "", "") for n in range(3)]
    with torch.no_grad():
        parts = []
        for s in samples:
            full = s.prefix_ids.tolist() + s.suffix_ids.tolist()
            split = 1 if loss_on == "all" else len(s.prefix_ids)
            parts.append(llama_logprobs(llama, full[:split], full[split:]))
    objective = open_objective(ObjectiveConfig.model_validate({"kind": "next_token", "loss_on": loss_on}))
    stats = update(policy, None, [objective.row_of_sample(s) for s in samples], objective)
    assert stats.loss == pytest.approx(-torch.cat(parts).mean().item(), abs=1e-5)


def test_a_non_finite_loss_leaves_the_parameters(mesh: Mesh) -> None:
    policy = Policy(small_run(), VOCAB, mesh)
    before = [p.clone() for p in policy.model.parameters()]
    rows = best_of(choices(0, 3))

    def broken(log_probs, packed, number):
        return LossSums(log_probs.sum() * float("nan"), 1)

    with pytest.raises(NonFiniteError, match="documents 0, 1, 2"):
        policy.update(policy.micro_batches(rows), broken, documents_of(rows))
    assert all(torch.equal(p, q) for p, q in zip(policy.model.parameters(), before, strict=True))
    update(policy, None, rows, NLL)  # the run could go on


def test_a_batch_that_teaches_nothing_changes_nothing(mesh: Mesh) -> None:
    policy = Policy(small_run(), VOCAB, mesh)
    before = [p.clone() for p in policy.model.parameters()]
    stats = update(policy, None, [], NLL)
    assert stats.loss == 0.0
    assert all(torch.equal(p, q) for p, q in zip(policy.model.parameters(), before, strict=True))


def test_views_share_the_optimizers_storage(mesh: Mesh) -> None:
    policy = Policy(small_run(parallel={"distributed_optimizer": True}), VOCAB, mesh)
    views = weight_views(policy.model, VOCAB, 0)
    assert views.head is not None
    before = views.head.clone()
    update(policy, None, best_of(choices(0, 3)), NLL)
    assert not torch.equal(views.head, before)
    pointers = {p.data_ptr() for p in policy.model.parameters()}
    assert {t.data_ptr() for t in views.tensors()} == pointers


def test_split_by_tokens_keeps_order_and_bound() -> None:
    assert split_by_tokens([5, 5, 5], 10) == [[0, 1], [2]]
    assert split_by_tokens([30, 2, 8], 10) == [[0], [1, 2]]
    assert split_by_tokens([], 10) == []


@given(lengths=st.lists(st.integers(1, 20), max_size=9), max_tokens=st.integers(1, 40))
def test_micro_batches_are_few_and_balanced(lengths: list[int], max_tokens: int) -> None:
    """Against all ways to cut the rows: no fewer micro-batches fit, and none as few has a shorter longest one."""
    groups = split_by_tokens(lengths, max_tokens)
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in group) for group in groups]
    assert all(load <= max_tokens or len(group) == 1 for load, group in zip(loads, groups, strict=True))
    for num_cuts in range(len(groups)):
        for cuts in combinations(range(1, len(lengths)), num_cuts):
            parts = [lengths[a:b] for a, b in pairwise((0, *cuts, len(lengths)))]
            if all(sum(part) <= max_tokens or len(part) == 1 for part in parts):
                assert len(parts) == len(groups)
                assert max(loads) <= max(map(sum, parts))
