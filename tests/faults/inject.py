"""The one place that injects faults into a run: by the environment, into a `sip` command of its own process.

    SIP_FAULT="at=update step=2 rank=1 do=SIGSTOP"        several, with semicolons
    at     phase whose beginning it is: start, data, generate, judge, update, save, evaluation, between (two steps)
    step   the step being made, from 1; any without it
    rank   any without it
    do     a signal's name; "hang" (the main thread never comes back); "full" (no file can grow any more); "raise";
           "slow=S" (S seconds, every time); "cut=NAME" (the network device of that name goes down)

`python inject.py COMMAND ...` is `sip COMMAND ...` with the faults. Where SIP_STORE is set, the processes meet in
that file rather than at a port.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field


@dataclass
class Fault:
    at: str
    do: str
    step: int | None = None
    rank: int | None = None
    done: bool = field(default=False)

    def fits(self, phase: str, step: int, rank: int) -> bool:
        return (
            not self.done
            and self.at == phase.split()[0]
            and self.step in (None, step)
            and self.rank in (None, rank)
        )

    def strike(self) -> None:
        if self.do.startswith("slow="):
            time.sleep(float(self.do.removeprefix("slow=")))
            return
        self.done = True
        if self.do == "hang":
            print("hanging", file=sys.stderr, flush=True)
            while True:
                threading.Event().wait(3600)
        elif self.do == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif self.do.startswith("cut="):
            subprocess.run(["ip", "link", "set", "dev", self.do.removeprefix("cut="), "down"], check=True)
        elif self.do == "raise":
            raise ValueError("injected")
        else:
            os.kill(os.getpid(), signal.Signals[self.do])


def parse(text: str) -> list[Fault]:
    """The faults that an environment variable asks for."""
    faults = []
    for part in filter(None, (one.strip() for one in text.split(";"))):
        values = dict(word.split("=", 1) for word in part.split())
        step, rank = (int(values[name]) if name in values else None for name in ("step", "rank"))
        faults.append(Fault(values["at"], values["do"], step, rank))
    return faults


def install(faults: list[Fault], rank: int) -> None:
    """Have them strike where the run says that it enters a phase."""
    from sip_engine.utils import heartbeat

    enter = heartbeat.enter

    def entering(phase: str, step: int | None = None) -> None:
        enter(phase, step)
        for fault in faults:
            if threading.current_thread() is threading.main_thread() and fault.fits(
                phase, heartbeat.position().step, rank
            ):
                fault.strike()

    heartbeat.enter = entering


def main() -> None:
    rank = int(os.environ.get("RANK", "0"))
    install(parse(os.environ.get("SIP_FAULT", "")), rank)
    store = os.environ.get("SIP_STORE")
    if store:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        size = int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    from sip_engine.cli import main as sip

    sip()


if __name__ == "__main__":
    main()
