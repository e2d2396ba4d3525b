"""One step of the whole loop without a judge (rollouts, then DPO on two of each prefix) against transformers.

    python -m benchmarks loop

Ours: the sampler, then the update with each prefix once. Peer: `generate` with `num_return_sequences`, then a DPO
step in plain torch. Same weights, prefixes and numbers of tokens; the two take turns in one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks import sampler as sampling
from benchmarks.record import RESULTS, header, timed, write_csv
from benchmarks.sampler import MODEL, VOCAB
from benchmarks.update import SUFFIX, PlainDpo, run_config
from sip_engine.config.schema import ObjectiveConfig, SamplerConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.objectives.base import open_objective, rows_of_choices
from sip_engine.objectives.update import update
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.sampler import Sampler
from sip_engine.types import Candidate, Choice, Kind, Sample


def choices_of(prefixes: Sequence[np.ndarray], rollouts: Sequence[Sequence[np.ndarray]]) -> list[Choice]:
    """The first two rollouts of each prefix as chosen and rejected: a judge's work is not measured here."""
    made = []
    for number, (prefix, ids) in enumerate(zip(prefixes, rollouts, strict=True)):
        pool = tuple(Candidate(Kind.ROLLOUT, n, one, "") for n, one in enumerate(ids[:2]))
        made.append(Choice(Sample(number, 0, prefix, pool[0].ids, "", ""), pool, 0, 1, 1.0))
    return made


def measure(mesh: Mesh, prefix: int, rollouts: int, prompts: int, repeats: int) -> dict[str, object]:
    """Seconds of both sides' generation and update, medians of alternating steps, and their ratio."""
    cfg = run_config(micro_batch_tokens=prompts * (prefix + 2 * SUFFIX))
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    settings = SamplerConfig(max_sequences=prompts * rollouts, kv_memory_mb=4096)
    sampler = Sampler(weight_views(policy.model, VOCAB, 0), mesh, settings)
    objective = open_objective(ObjectiveConfig(kind="dpo", beta=0.1))
    peer = PlainDpo(policy, objective.cfg.beta)
    batch = sampling.prefixes(prompts, prefix)
    seconds: dict[str, list[float]] = {
        name: [] for name in ("ours_generate", "ours_update", "peer_generate", "peer_update")
    }
    drawn: dict[str, list[list[np.ndarray]]] = {}

    def generate() -> None:
        done = sampling.ours(sampler, batch, rollouts, SUFFIX)
        drawn["ours"] = [[c.ids for c in group] for group in done]

    def peer_generate() -> None:
        with torch.no_grad():
            done = (
                sampling.peer(peer.llama, batch, rollouts, SUFFIX)[:, prefix:].cpu().numpy().astype(np.int32)
            )
        drawn["peer"] = [list(group) for group in done.reshape(prompts, rollouts, SUFFIX)]

    for turn in range(repeats + 1):
        found = {"ours_generate": timed(generate), "peer_generate": timed(peer_generate)}
        ours, theirs = choices_of(batch, drawn["ours"]), choices_of(batch, drawn["peer"])
        training = rows_of_choices(objective, ours)
        found["ours_update"] = timed(lambda rows=training: update(policy, reference, rows, objective))
        found["peer_update"] = timed(lambda pairs=theirs: peer.step(pairs))
        if turn:  # the first is the warm-up
            for name, value in found.items():
                seconds[name].append(value)
    medians = {name: median(values) for name, values in seconds.items()}
    mine = medians["ours_generate"] + medians["ours_update"]
    other = medians["peer_generate"] + medians["peer_update"]
    return {
        "prompts": prompts,
        "prefix": prefix,
        "rollouts": rollouts,
        **{f"{name}_s": round(value, 3) for name, value in medians.items()},
        "ours_s": round(mine, 3),
        "peer_s": round(other, 3),
        "ratio": round(other / mine, 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write the CSV file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", type=int, nargs="+", default=[128, 512], help="prefix lengths")
    parser.add_argument("--rollouts", type=int, default=16, help="rollouts a prefix")
    parser.add_argument("--prompts", type=int, default=4, help="prefixes a step")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of each side")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both sides"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "loop_cpu.csv", help="CSV file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    mesh = start_mesh()
    rows = []
    for prefix in args.prefix:
        row = measure(mesh, prefix, args.rollouts, args.prompts, args.repeats)
        about = {**header("loop", ("torch", "transformers")), "threads": args.threads}
        rows.append({**about, "layers": MODEL.num_layers, "hidden": MODEL.hidden_size, **row})
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
