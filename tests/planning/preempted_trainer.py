"""A stand-in for a run: counts steps, waits at some to be told to stop, saves, ends with 75, goes on from there.

`python preempted_trainer.py FOLDER STEPS`: at every third step it writes its rank to the pipe `FOLDER/waiting` and
waits for a signal; after STEPS it ends with 0. Files `rank-N` hold the steps that each rank saved.
"""

import os
import signal
import sys
from pathlib import Path


def main() -> int:
    folder, steps, rank = Path(sys.argv[1]), int(sys.argv[2]), os.environ["RANK"]
    signals = {signal.SIGUSR1, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    saved = folder / f"rank-{rank}"
    step = int(saved.read_text().split()[-1]) if saved.exists() else 0
    while step < steps:
        step += 1
        if step % 3 == 0 and step < steps:
            with (folder / "waiting").open("a") as pipe:
                pipe.write(f"{rank}\n")
            signal.sigwait(signals)
            with saved.open("a") as file:
                file.write(f" {step}")
            return 75
    with saved.open("a") as file:
        file.write(f" {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
