"""What every rank of a test of imported models does; light to import, unlike transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from conftest import small_run
from megatron.core import parallel_state

from sip_engine.config.schema import ObjectiveConfig, SamplerConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.checkpoint import load_weights, read_state
from sip_engine.policy.packing import pack_rows
from sip_engine.policy.policy import Policy
from sip_engine.policy.rows import Row
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler
from sip_engine.types import Sample


def random_rows(seed: int, vocab_size: int) -> list[Row]:
    """Ragged rows, the last one with every token as a suffix of its own: the whole next distribution."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> np.ndarray:
        return rng.integers(0, vocab_size, n).astype(np.int32)

    ragged = [(7, (5, 3)), (40, (20, 9)), (1, (1, 30))]
    rows = [Row(ids(prefix), tuple(ids(n) for n in suffixes)) for prefix, suffixes in ragged]
    return [*rows, Row(ids(60), tuple(np.array([t], np.int32) for t in range(vocab_size)))]


def one_update(folder: Path, checkpoints: str, layouts: str) -> None:
    """On every rank, for each layout: load each checkpoint, score and sample, make one update, score again."""
    for label, layout in json.loads(layouts).items():
        mesh = start_mesh(layout.get("tensor", 1), layout.get("pipeline", 1))
        for name, checkpoint in json.loads(checkpoints).items():
            _update(folder / f"{label} {name}.npz", Path(checkpoint), layout, mesh)
        if mesh.size > 1:
            parallel_state.destroy_model_parallel()  # the processes stay together for the next layout


def _update(out: Path, checkpoint: Path, parallel: dict, mesh: Mesh) -> None:
    state = read_state(checkpoint)
    # A large eps keeps Adam from blowing the rounding of tiny gradients up to whole steps.
    optimizer = {"lr": 1e-2, "warmup_steps": 0, "eps": 1e-3}
    cfg = small_run(model=state.model, parallel=parallel, optimizer=optimizer)
    policy = Policy(cfg, state.vocab_size, mesh)
    load_weights(checkpoint, policy.model, state.model, state.vocab_size)
    policy.optimizer.reload_model_params()
    rows = random_rows(0, state.vocab_size)
    packed = pack_rows(rows, mesh.device, multiple=mesh.tp.size)
    before = [part.numpy() for part in policy.score([packed])]
    sampler = Sampler(weight_views(policy.model, state.vocab_size, mesh.tp.rank), mesh, SamplerConfig())
    (drawn,) = sampler.generate([Request(rows[0].prefix, 2)], SamplingParams(max_new_tokens=8, seed=1))
    samples = [Sample(n, 0, row.prefix, row.suffixes[0], "", "") for n, row in enumerate(rows[:3])]
    objective = open_objective(ObjectiveConfig(kind="next_token"))
    update(policy, None, [objective.row_of_sample(s) for s in samples], objective)
    after = [part.numpy() for part in policy.score([packed])]
    if mesh.pp.is_last and mesh.tp.is_first and mesh.dp.is_first:
        np.savez(
            out,
            before=before[0],
            after=after[0],
            ids=np.concatenate([c.ids for c in drawn]),
            logprobs=np.concatenate([c.logprobs for c in drawn]),
        )
