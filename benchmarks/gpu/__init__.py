"""The acceptance run on a GPU: thirteen items in under ten minutes, or a rehearsal of them without one.

    python -m benchmarks gpu --minutes 9 --out runs/gpu       # on a GPU
    python -m benchmarks gpu --rehearse --out runs/rehearsal  # anywhere: every item, tiny, on an emulated device
    python -m benchmarks gpu --tune --out runs/tune           # on a GPU: other tiles, measured; rewrites tiles.csv

Each item is a process with its own deadline; the next one runs when one fails; the same command goes on where it
stopped. `results.jsonl` holds an item a line, `table.md` everything beside predictions, targets and peers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all good, 1 an item failed, 130 interrupted, others as those of `sip`: 2 it cannot run so."""
    from benchmarks.gpu.items import ITEMS
    from benchmarks.gpu.runner import Options, ended_by_signals, run
    from sip_engine.utils.errors import SipError

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all items together")
    parser.add_argument("--items", type=int, nargs="+", default=[], metavar="N", help="only these")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on an emulated device")
    parser.add_argument("--profile", action="store_true", help="write traces, and figures of ncu where it is")
    parser.add_argument(
        "--tune", action="store_true", help="try other tiles and write the best into the table"
    )
    args = parser.parse_args(argv)
    try:
        if args.tune and (args.items or args.profile):
            raise ValueError("--tune runs no items: leave out --items and --profile")
        if not 0 < args.minutes <= 24 * 60:
            raise ValueError(f"--minutes {args.minutes:g}: must be above 0 and at most a day")
        unknown = sorted(set(args.items) - {item.number for item in ITEMS})
        if unknown:
            raise ValueError(f"--items {unknown[0]}: there are 1 to {len(ITEMS)}")
        if not args.rehearse:
            _check_device()
        if args.tune:
            from benchmarks.gpu.tune import tune

            with ended_by_signals():
                return tune(args.out, args.minutes, rehearse=args.rehearse)
        with ended_by_signals():
            return run(Options(args.out, args.minutes, args.rehearse, args.profile, tuple(args.items)))
    except (ValueError, SipError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _check_device() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device: --rehearse runs everything on an emulated one")
