"""Seconds from a signal to the end of all processes, a table: `python tests/faults/exit_times.py`."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from small_runs import saved, start

PHASES = ("data", "generate", "judge", "update", "evaluation")


def seconds(folder: Path, name: str, phase: str, ranks: int) -> float:
    """From the line that says that the signal was heard to the last exit; nan where nothing was saved."""
    step = 3 if phase == "evaluation" else 2
    processes = start(folder, ranks=ranks, fault=f"at={phase} step={step} rank=0 do={name}")
    output = processes[0].stdout
    assert output is not None
    while (line := output.readline()) and "ending after" not in line:
        pass
    begun = time.monotonic()
    for process in processes:
        process.communicate()
    return time.monotonic() - begun if saved(folder) else float("nan")


def main() -> None:
    print("| signal, processes | " + " | ".join(PHASES) + " |\n|" + " --- |" * (len(PHASES) + 1))
    for ranks in (1, 2):
        for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"):
            with tempfile.TemporaryDirectory() as folder:
                times = [seconds(Path(folder) / phase, name, phase, ranks) for phase in PHASES]
            print(f"| {name}, {ranks} | " + " | ".join(f"{one:.1f}" for one in times) + " |", flush=True)


if __name__ == "__main__":
    main()
