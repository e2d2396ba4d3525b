"""Runs a function of a test module on several gloo processes that meet in a file, not at a port."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path


def run_ranks(function: str, size: int, folder: Path, *arguments: str) -> None:
    """Call `module:function(folder, *arguments)` on `size` processes; fails with the first one's output."""
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "store"
    store.unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-P", __file__, function, str(size), str(store), str(folder), *arguments]
    ranks = [
        subprocess.Popen(
            [*command[:4], str(rank), *command[4:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    for number, (rank, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert rank.returncode == 0, f"rank {number} of {size} failed:\n{output[-3000:]}"


def _main(function: str, rank: str, size: str, store: str, folder: str, *arguments: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    tests = Path(__file__).parent
    sys.path[:0] = [str(tests), *(str(folder) for folder in tests.iterdir() if folder.is_dir())]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size))
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(Path(folder), *arguments)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
