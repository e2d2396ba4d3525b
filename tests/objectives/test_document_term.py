"""The next-token term on documents beside each objective's loss, against plain torch in float64 and against Llama."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_run
from hypothesis import given, settings
from hypothesis import strategies as st
from llama import llama_logprobs, llama_of
from made_choices import VOCAB, choices
from ranks import run_ranks

from sip_engine.config.objective import OBJECTIVES, LearnsFrom
from sip_engine.config.schema import ObjectiveConfig, RunConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.monitoring.metrics import update_metrics
from sip_engine.objectives.base import Objective, open_objective, rows_of_choices
from sip_engine.objectives.update import update
from sip_engine.policy.packing import PackedRows, pack_rows, split_by_tokens
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.policy.rows import Row
from sip_engine.types import Candidate, Choice, Kind, Sample

POOL_KINDS = [
    kind
    for kind in OBJECTIVES.names()
    if OBJECTIVES.is_built_in(kind) and ObjectiveConfig(kind=kind).facts.learns_from is LearnsFrom.POOLS
]


class Given:
    """In the place of policy and reference: float64 log-probs that are looked up by the token they are of.

    A token's place in the row is told by its id: every id occurs once in a test.
    """

    def __init__(self, values: torch.Tensor, max_tokens: int = 4096) -> None:
        self.values, self.max_tokens = values, max_tokens

    def micro_batches(self, rows: Sequence[Row]) -> list[PackedRows]:
        groups = split_by_tokens([row.num_tokens for row in rows], self.max_tokens)
        return [pack_rows([rows[i] for i in group], torch.device("cpu"), multiple=8) for group in groups]

    def score(self, batches: Sequence[PackedRows]) -> list[torch.Tensor]:
        return [self.values[batch.targets] for batch in batches]

    def update(self, batches: Sequence[PackedRows], loss: Any, documents: str, check: Any) -> torch.Tensor:
        found = [loss(self.values[b.targets], b, number) for number, b in enumerate(batches)]
        self.sums = {k: sum(part.sums.get(k, 0.0) for part in found) for part in found for k in part.sums}
        return torch.stack([part.loss for part in found]).sum() / sum(part.units for part in found)


def a_choice(lens: tuple[int, int, int, int], number: int, base: int, role: str, *, paired: bool) -> Choice:
    """Prefix, original and two more candidates of these lengths; ids rise from `base`, none occurs twice.

    role: what the original is: "chosen", "rejected", or "neither".
    """
    starts = base + np.cumsum([0, *lens])
    prefix, original, one, other = (np.arange(a, b, dtype=np.int32) for a, b in pairwise(starts.tolist()))
    kinds = (Kind.ORIGINAL, Kind.REWRITE, Kind.ROLLOUT)
    pool = tuple(
        Candidate(kind, 0, ids, kind, -np.ones(len(ids)) if kind is Kind.ROLLOUT and lens[0] else None)
        for kind, ids in zip(kinds, (original, one, other), strict=True)
    )
    chosen, rejected = {"chosen": (0, 2), "rejected": (1, 0), "neither": (2, 1)}[role]
    sample = Sample(number, 0, prefix, original, "", "original")
    return Choice(sample, pool, chosen, rejected if paired else None, 1.0)


lengths = st.tuples(st.integers(0, 5), *[st.integers(2, 7)] * 3)
roles = st.sampled_from(["chosen", "rejected", "neither"])


@pytest.mark.parametrize("kind", POOL_KINDS)
@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(lengths, roles), min_size=1, max_size=5), st.integers(8, 60), st.integers(0, 9))
def test_the_term_equals_plain_torch(kind: str, shapes: list, max_tokens: int, seed: int) -> None:
    """Loss and gradients; micro-batches of any size; the original may be chosen, rejected or neither."""
    weight = 0.7
    objective = open_objective(
        ObjectiveConfig(kind=kind, beta=0.4, nll_weight=0.2, document_nll_weight=weight)
    )
    paired = objective.loss_unit == "nats a pair"
    batch, base = [], 0
    for number, (lens, role) in enumerate(shapes):
        batch.append(a_choice(lens, number, base, role, paired=paired))
        base += sum(lens)
    values, frozen = -torch.rand(2, base, dtype=torch.float64, generator=torch.manual_seed(seed)) * 4
    values.requires_grad_()
    got = update(Given(values, max_tokens), Given(frozen), rows_of_choices(objective, batch), objective)  # type: ignore[arg-type]
    assert isinstance(got, torch.Tensor)
    (got_grad,) = torch.autograd.grad(got, values)

    total, units = torch.zeros((), dtype=torch.float64), 0
    for choice in batch:
        skip = int(len(choice.sample.prefix_ids) == 0)
        chosen, *rest = (values[c.ids[skip:].tolist()] for c in choice.trained())
        before, *_ = (frozen[c.ids[skip:].tolist()] for c in choice.trained())
        original = values[choice.sample.suffix_ids[skip:].tolist()]
        if paired:
            other = frozen[choice.trained()[1].ids[skip:].tolist()]
            z = 0.4 * ((chosen.sum() - before.sum()) - (rest[0].sum() - other.sum()))
            total = total + torch.log1p(torch.exp(-z)) - 0.2 * chosen.mean() - weight * original.mean()
            units += 1
        else:
            total = total - chosen.sum() - weight * len(chosen) * original.mean()
            units += len(chosen)
    (want_grad,) = torch.autograd.grad(total / units, values)
    torch.testing.assert_close(got, total / units, atol=1e-6, rtol=1e-6)  # weights are float32
    torch.testing.assert_close(got_grad, want_grad, atol=1e-7, rtol=1e-6)


def test_nothing_changes_at_weight_0_nor_where_nothing_is_scored() -> None:
    choice = a_choice((0, 1, 3, 4), 0, 0, "neither", paired=True)
    plain, held = (open_objective(ObjectiveConfig(document_nll_weight=w)) for w in (0.0, 0.5))
    for objective, one in ((plain, choice), (held, choice)):  # one token after an empty prefix
        (row,) = rows_of_choices(objective, [one, None])
        assert len(row.suffixes) == 2 and row.document_weight == 0.0
    packed = pack_rows([row], torch.device("cpu"))
    assert packed.document_weights is None and packed.without_documents() == (packed, None)


def test_side_values_stay_beside_their_targets() -> None:
    """What the objective sees of a micro-batch with documents is what it sees without them, rows of both mixed."""
    objective = open_objective(ObjectiveConfig(document_nll_weight=0.5))
    made = [
        a_choice((3, 4, 2, 5), 0, 0, "neither", paired=True),
        a_choice((0, 1, 3, 2), 1, 20, "chosen", paired=True),
    ]
    rows = [
        replace(row, weights=tuple(np.arange(n) + 1.0 for n in row.num_scored))
        for row in map(objective.row_of_choice, made)
    ]
    longer = rows_of_choices(Weighted(objective.cfg), made)
    assert [len(row.suffixes) for row in longer] == [3, 2]
    bare, full = (pack_rows(these, torch.device("cpu"), multiple=16) for these in (rows, longer))
    seen, kept = full.without_documents()
    assert kept is not None and full.document_weights is not None
    for name in ("targets", "sampled", "weights"):
        torch.testing.assert_close(getattr(seen, name), getattr(bare, name), equal_nan=True)
    assert seen.target_lens == bare.target_lens
    torch.testing.assert_close(full.tokens[full.scored[kept]], bare.tokens[bare.scored])
    assert full.document_weights.tolist() == [0.0] * 7 + [0.125] * 4 + [0.0]


class Weighted(Objective):
    """Pairs with weights of single tokens."""

    def row_units(self, row: Row) -> int:
        return 1

    def row_of_choice(self, choice: Choice) -> Row:
        row = super().row_of_choice(choice)
        return replace(row, weights=tuple(np.arange(n) + 1.0 for n in row.num_scored))


@pytest.mark.parametrize("kind", POOL_KINDS)
def test_units_of_rows_are_those_of_the_loss(kind: str) -> None:
    objective = open_objective(ObjectiveConfig(kind=kind))
    paired = objective.loss_unit == "nats a pair"
    rows = [
        objective.row_of_choice(a_choice((n, 3, 2 + n, 4), n, 0, "chosen", paired=paired)) for n in (0, 2)
    ]
    packed = pack_rows(rows, torch.device("cpu"))
    zeros = torch.zeros(len(packed.targets))
    assert objective.loss(zeros, packed, zeros).units == sum(map(objective.row_units, rows))


@pytest.mark.parametrize("kind", ["next_token", "grpo"])
def test_an_objective_that_chooses_nothing_refuses_it(kind: str) -> None:
    task = {"task": "judge", "data": {"path": "a", "eval_path": "b"}} if kind == "grpo" else {}
    with pytest.raises(ValueError, match=rf'document_nll_weight .*"{kind}" does not make: remove it'):
        RunConfig.model_validate({"objective": {"kind": kind, "document_nll_weight": 0.1}, **task})


def held_steps(folder: Path, tokens: str) -> None:
    """On every rank: an update of three rows, the first process' share two of them; loss, norm and metrics."""
    mesh = start_mesh()
    cfg = small_run(parallel={"micro_batch_tokens": int(tokens)}, optimizer={"lr": 1e-3, "warmup_steps": 0})
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    objective = open_objective(ObjectiveConfig(beta=0.3, document_nll_weight=0.6))
    rows = rows_of_choices(objective, choices(4, 3)[mesh.dp.rank :: mesh.dp.size])
    (folder / f"held-{mesh.rank}.json").write_text(
        json.dumps(update_metrics(update(policy, reference, rows, objective)))
    )


@pytest.mark.parametrize(("size", "tokens"), [(1, 4096), (2, 30)])
def test_updates_equal_llamas_on_any_layout(mesh: Mesh, tmp_path: Path, size: int, tokens: int) -> None:
    """The original is read after the prefix and nothing else, and its term is a mean over pairs of all processes."""
    run_ranks("test_document_term:held_steps", size, tmp_path, str(tokens))
    llama = llama_of(Policy(small_run(), VOCAB, mesh).model, VOCAB)
    losses, nlls = [], []
    for choice in choices(4, 3):
        prefix = choice.sample.prefix_ids.tolist()
        chosen, rejected = (llama_logprobs(llama, prefix, c.ids.tolist()) for c in choice.trained())
        original = llama_logprobs(llama, prefix, choice.sample.suffix_ids.tolist())
        margin = 0.3 * ((chosen - chosen.detach()).sum() - (rejected - rejected.detach()).sum())
        losses.append(torch.log1p(torch.exp(-margin)) - 0.6 * original.mean())
        nlls.append(-original.detach())
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), 1e9)
    for rank in range(size):
        found = json.loads((tmp_path / f"held-{rank}.json").read_text())
        assert found["loss"] == pytest.approx(loss.item(), abs=2e-5)
        assert found["grad_norm"] == pytest.approx(norm.item(), rel=2e-4)
        assert found["document/nll"] == pytest.approx(torch.cat(nlls).mean().item(), abs=2e-5)
