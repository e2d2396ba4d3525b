"""What is known of single tokens travels with its rows; drift is averaged over tokens, its maximum is a maximum."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_run
from ranks import run_ranks

from sip_engine.config.schema import ObjectiveConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.monitoring.metrics import update_metrics
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.packing import pack_rows
from sip_engine.policy.policy import Policy
from sip_engine.policy.rows import Row
from sip_engine.types import Labels

VOCAB = 101
NLL = open_objective(ObjectiveConfig(kind="rf_nll"))


def ids(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(0, VOCAB, length).astype(np.int32)


def test_side_values_stand_beside_their_targets() -> None:
    """Arrays, single numbers and none; an empty prefix, labels, a row without, padding."""
    rng, nan = np.random.default_rng(0), float("nan")
    labels = (Labels(np.array([1, 0, 1]), ids(rng, 3)),)
    rows = [
        Row(
            ids(rng, 2),
            (ids(rng, 3), ids(rng, 1), ids(rng, 2)),
            sampled=(np.array([-1.0, -2.0, -3.0]), None, np.array([-4.0, -5.0])),
            advantages=(0.5, -0.5, np.array([0.0, 7.0])),
        ),
        Row(ids(rng, 0), (ids(rng, 3),), advantages=(2.0,)),
        Row(ids(rng, 1), (ids(rng, 2),), labels, weights=(np.array([3.0, 0.0, 1.5]),)),
        Row(ids(rng, 4), (ids(rng, 2),)),
    ]
    packed = pack_rows(rows, torch.device("cpu"), multiple=16)
    assert packed.target_lens == (3, 1, 2, 2, 3, 2)
    want = {
        "sampled": [-1, -2, -3, nan, -4, -5, nan, nan, nan, nan, nan, nan, nan],
        "advantages": [0.5, 0.5, 0.5, -0.5, 0, 7, 2, 2, 0, 0, 0, 0, 0],
        "weights": [1, 1, 1, 1, 1, 1, 1, 1, 3, 0, 1.5, 1, 1],
    }
    for name, values in want.items():
        got = getattr(packed, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, torch.tensor(values, dtype=torch.float32), equal_nan=True)
    bare = pack_rows([rows[3], replace(rows[3], sampled=(None,))], torch.device("cpu"))
    assert bare.sampled is bare.advantages is bare.weights is None
    with pytest.raises(ValueError):
        pack_rows([replace(rows[0], sampled=(np.zeros(2), None, np.zeros(2)))], torch.device("cpu"))


@pytest.mark.parametrize("micro_batch_tokens", [4096, 9])
def test_weights_weigh_each_tokens_loss(mesh: Mesh, micro_batch_tokens: int) -> None:
    policy = Policy(small_run(parallel={"micro_batch_tokens": micro_batch_tokens}), VOCAB, mesh)
    rng = np.random.default_rng(1)
    rows = [Row(ids(rng, 3), (ids(rng, n),), weights=(rng.random(n),)) for n in (2, 5, 3)]
    log_probs = torch.cat(policy.score(policy.micro_batches(rows)))
    weights = torch.from_numpy(np.concatenate([row.weights[0] for row in rows]))  # type: ignore[arg-type]
    stats = update(policy, None, rows, NLL)
    assert stats.loss == pytest.approx(-(log_probs.double() * weights).sum().item() / 10, abs=1e-5)


GAPS = [[0.5, 0.25], [0.125, 0.75], [0.375, 0.0625]]
"""Of two sampled tokens of each row; the largest of the first process is not the largest of all."""


def planted(folder: Path, tokens: str) -> None:
    """On every rank: rows whose sampler is off by known gaps, in micro-batches of `tokens`; what the update logs."""
    mesh = start_mesh()
    policy = Policy(small_run(parallel={"micro_batch_tokens": int(tokens)}), VOCAB, mesh)
    rng = np.random.default_rng(2)
    rows = [Row(ids(rng, 3), (ids(rng, 2),)) for _ in GAPS]
    log_probs = torch.cat(policy.score(policy.micro_batches(rows))).view(-1, 2).numpy()
    rows = [
        replace(row, sampled=(own - np.array(gap),))
        for row, own, gap in zip(rows, log_probs, GAPS, strict=True)
    ]
    stats = update(policy, None, rows[mesh.dp.rank :: mesh.dp.size], NLL)
    (folder / f"drift-{mesh.rank}.json").write_text(json.dumps(update_metrics(stats)))


@pytest.mark.parametrize(("size", "tokens"), [(1, 4096), (2, 5)])
def test_the_largest_drift_is_a_maximum(tmp_path: Path, size: int, tokens: int) -> None:
    """Over micro-batches of one row each and over processes."""
    run_ranks("test_side_values:planted", size, tmp_path, str(tokens))
    for rank in range(size):
        found = json.loads((tmp_path / f"drift-{rank}.json").read_text())
        assert found["drift/max"] == pytest.approx(0.75, abs=1e-5)
        assert found["drift/mean"] == pytest.approx(np.mean(GAPS), abs=1e-5)
