"""How long the training stands still for a checkpoint: written at once, and beside the updates that follow.

Rows: mode "blocking" or "asynchronous"; stall is what `save` (and the commit by a later `poll`) takes of the loop,
save the time until the checkpoint is there, update an update's seconds without and with a save beside it, host_copy
the memory that the copy of the tensors takes, the same for every save.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS, at_least, header, timed, write_csv
from sip_engine.config.parse import parse_config
from sip_engine.config.schema import ObjectiveConfig, RunConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import start_mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.checkpoint import CheckpointState, CheckpointWriter
from sip_engine.policy.policy import Policy
from sip_engine.policy.rows import Row

VOCAB = 8192
TEXTS = ["the quick brown fox jumps over the lazy dog"] * 20


class Training:
    """A policy that next-token training updates, over and over on the same random rows."""

    def __init__(self, hidden: int, layers: int) -> None:
        self.cfg: RunConfig = parse_config(
            {
                "model": {
                    "num_layers": layers,
                    "hidden_size": hidden,
                    "num_heads": hidden // 64,
                    "num_kv_heads": hidden // 64,
                    "ffn_size": 2 * hidden,
                    "max_context": 512,
                },
                "objective": {"kind": "next_token"},
                "eval": {"generate": False},
                "data": {"suffix_tokens": 128, "max_prefix_tokens": 128},
            },
            "benchmark",
        )
        self.policy = Policy(self.cfg, VOCAB, start_mesh())
        generator = np.random.default_rng(0)
        ids = generator.integers(0, VOCAB, (4, 256)).astype(np.int32)
        self.rows = [Row(one[:128], (one[128:],)) for one in ids]
        self.objective = open_objective(ObjectiveConfig(kind="next_token"))

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.policy.model.parameters())

    def update(self) -> None:
        update(self.policy, None, self.rows, self.objective)


def measure(training: Training, folder: Path, asynchronous: bool, repeats: int) -> dict[str, float]:
    """Medians over `repeats` saves, after one that is not counted (it makes the copy's buffers)."""
    tokenizer = Tokenizer.train(TEXTS, 290, folder / "tokenizer.model")
    mesh = training.policy.mesh
    writer = CheckpointWriter(folder / "checkpoints", mesh, keep=1, asynchronous=asynchronous)
    stalls, saves, alone, beside = [], [], [], []
    for step in range(repeats + 1):
        alone.append(timed(training.update))
        state = CheckpointState(step, training.cfg.model, VOCAB, {})
        begun = time.perf_counter()
        stall = timed(lambda state=state: writer.save(training.policy, None, state, tokenizer))
        committed = folder / "checkpoints" / f"step_{step:08d}"
        while not committed.exists():
            beside.append(timed(training.update))
            stall += timed(writer.poll)
        stalls.append(stall)
        saves.append(time.perf_counter() - begun)
    size = sum(file.stat().st_size for file in committed.rglob("*") if file.is_file())
    return {
        "stall_s": statistics.median(stalls[1:]),
        "save_s": statistics.median(saves[1:]),
        "update_alone_s": statistics.median(alone[1:]),
        "update_beside_s": statistics.median(beside) if beside else float("nan"),
        "checkpoint_mb": size / 1e6,
        "host_copy_mb": writer.host_bytes / 1e6,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both modes, print them, write the CSV file."""
    parser = argparse.ArgumentParser(description="What a checkpoint costs the training.")
    parser.add_argument("--hidden", type=at_least(64), default=512, help="width, a multiple of 64")
    parser.add_argument("--layers", type=at_least(1), default=8)
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--folder", type=Path, help="where to write checkpoints; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint.csv")
    args = parser.parse_args(argv)
    if args.hidden % 64:
        parser.error(f"--hidden {args.hidden}: must be a multiple of 64")
    training = Training(args.hidden, args.layers)
    run = {**header("checkpoint", ("torch", "megatron-core")), "parameters": training.num_parameters}
    rows = []
    for mode in ("blocking", "asynchronous"):
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            found = measure(training, folder, mode == "asynchronous", args.repeats)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{mode:14}" + "  ".join(f"{name} {value:.3f}" for name, value in found.items()))
        rows.append({**run, "mode": mode, **{name: round(value, 4) for name, value in found.items()}})
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
