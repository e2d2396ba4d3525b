"""torchrun with two things more: signals are passed on to the workers, and the workers' own exit code comes back.

`python -m sip_engine.distributed.agent [torchrun's options] PROGRAM ...` on every node. Plain torchrun dies of
SIGUSR1, gives workers 30 seconds after a SIGTERM, and ends with 1 whatever they ended with; a launch script can then
not tell a run that was preempted and saved (75, requeue it) from one that failed.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

PASSED_ON = (signal.SIGUSR1, signal.SIGTERM)
"""Signals that ask a run to save and end; the workers decide when."""


def main(argv: list[str] | None = None) -> int:
    """Run the workers of this node; returns their exit code, 75 before any other one that is not 0."""
    # `python -m` would put the working directory, where the repository's own folders are, before the packages.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for signum in PASSED_ON:
        signal.signal(signum, _pass_on)
    args = parse_args(sys.argv[1:] if argv is None else argv)
    # Which signals torch answers by ending the workers: an option, and before torch had it a variable.
    args.signals_to_handle = os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    try:
        run(args)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return exit_code(codes)
    return 0


def exit_code(codes: list[int]) -> int:
    """One code for all workers: 75 if one was preempted, since the others then fail for want of it; else the first.

    A worker that a signal ended has its negative number; shells say 128 more than the number.
    """
    if os.EX_TEMPFAIL in codes:
        return os.EX_TEMPFAIL
    first = next((code for code in codes if code), 1)
    return first if first > 0 else 128 - first


def _pass_on(signum: int, frame: FrameType | None) -> None:
    del frame
    for pid in _children():
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def _children() -> list[int]:
    """The workers, which are this process's own children; other children (torch's log readers) are threads."""
    import psutil

    return [child.pid for child in psutil.Process().children()]


if __name__ == "__main__":
    sys.exit(main())
