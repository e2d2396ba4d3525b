"""Runs of a few steps, in processes of their own, that faults are injected into."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INJECT = Path(__file__).with_name("inject.py")
STEPS = 3
CONFIG = """
steps = 3
batch_size = 4
[model]
num_layers = 2
hidden_size = 16
num_heads = 2
num_kv_heads = 1
ffn_size = 24
max_context = 64
[world]
train_documents = 40
test_documents = 10
[data]
suffix_tokens = 8
max_prefix_tokens = 40
min_prefix_tokens = 8
vocab_size = 400
[[candidates]]
rollouts = 2
[judge]
backend = "world"
[optimizer]
lr = 1e-3
warmup_steps = 1
eps = 1e-6
[checkpoint]
every = 0
[eval]
every = 2
num_prefixes = 2
[monitors]
every = 0
[faults]
grace_s = 90
"""
"""Saves at its end only: what is found before was saved on leaving."""


@dataclass
class Ended:
    """How a process ended: exit code (negative for a signal that killed it) and what it said."""

    code: int
    said: str


def start(
    folder: Path,
    *options: object,
    ranks: int = 1,
    fault: str = "",
    each: Sequence[Sequence[object]] = (),
    port: int = 0,
    within: Sequence[Sequence[str]] = (),
    environment: Mapping[str, str] | None = None,
) -> list[subprocess.Popen[str]]:
    """`sip train` of CONFIG with options, on `ranks` gloo processes that meet in a file, or at `port`.

    each: further options of each rank. within: a command of each rank that runs its own command. environment:
    variables in the place of those that are set here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "run.toml"
    config.write_text(CONFIG)
    store = folder / "store"
    store.unlink(missing_ok=True)
    processes = []
    for rank in range(ranks):
        own = each[rank] if each else ()
        variables = os.environ | {"SIP_FAULT": fault, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            meeting = (
                {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if port else {"SIP_STORE": str(store)}
            )
            variables |= meeting
        variables |= environment or {}
        command = [
            *(within[rank] if within else ()),
            sys.executable,
            "-P",
            str(INJECT),
            "train",
            str(config),
            "--out",
            str(folder / "run"),
        ]
        command += ["--data.cache", str(folder / "cache"), *map(str, options), *map(str, own)]
        processes.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def wait(processes: Sequence[subprocess.Popen[str]], stopped: Sequence[int] = ()) -> list[Ended]:
    """How all of them end; those that were `stopped` are woken and killed when the others have ended."""
    ended: dict[int, Ended] = {}
    order = sorted(range(len(processes)), key=lambda rank: rank in stopped)
    try:
        for rank in order:
            if rank in stopped:
                processes[rank].kill()
            said = processes[rank].communicate(timeout=400)[0]
            ended[rank] = Ended(processes[rank].returncode, said)
    finally:
        for process in processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
    return [ended[rank] for rank in range(len(processes))]


def train(
    folder: Path, *options: object, ranks: int = 1, fault: str = "", stopped: Sequence[int] = ()
) -> list[Ended]:
    """`start` and `wait`."""
    return wait(start(folder, *options, ranks=ranks, fault=fault), stopped)


def metrics(folder: Path) -> list[dict[str, float]]:
    """All recorded metrics without times and what else is the machine's."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k != "elapsed" and not k.startswith(("seconds/", "machine/"))}
        for row in rows
    ]


def saved(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there; fails if there is anything half-written beside them."""
    checkpoints = folder / "run" / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.is_dir() else []
    assert all(name.startswith("step_") for name in names), names
    return [int(name.removeprefix("step_")) for name in names]
