"""One item in a process of its own: `python -m benchmarks.gpu.worker NUMBER --out FOLDER [--rehearse]`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from benchmarks.gpu.figures import Context, as_line
from benchmarks.gpu.items import ITEMS
from benchmarks.record import ROOT

FIGURES = "figures.jsonl"


def emulated() -> AbstractContextManager:
    """The tests' emulated CUDA device: true values, in Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(ROOT / "tests"))
    from emulated_cuda import emulated_cuda

    return emulated_cuda()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the item; its figures go to a file line by line. Exit code 1 if a figure is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, choices=[item.number for item in ITEMS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args(argv)
    item = next(item for item in ITEMS if item.number == args.number)
    args.out.mkdir(parents=True, exist_ok=True)
    all_right = True
    with (args.out / FIGURES).open("w", encoding="utf-8") as file:
        context = Context(item.number, args.out, args.rehearse, args.profile)

        def keep(figure) -> None:
            nonlocal all_right
            all_right &= figure.ok
            print(as_line(figure), file=file, flush=True)

        context.keep = keep
        with emulated() if args.rehearse else nullcontext():
            module, _, function = item.where.partition(":")
            getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(context)
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
