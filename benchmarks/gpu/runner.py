"""Each item in a process of its own with a deadline; what is done is not done again; the next runs when one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu.items import ITEMS, Item
from benchmarks.gpu.table import write_table
from benchmarks.gpu.worker import FIGURES
from benchmarks.record import ROOT, commit
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.files import check_writable, lock_folder, write_atomic

RESULTS_FILE, LOG = "results.jsonl", "log.txt"
REHEARSAL_S = 200.0
"""Deadline of an item of a rehearsal, which has no time to keep: other work may share its cores."""


@dataclass(frozen=True)
class Options:
    out: Path
    minutes: float = 9.0
    rehearse: bool = False
    profile: bool = False
    items: tuple[int, ...] = ()
    """Empty: all."""

    @property
    def kind(self) -> str:
        return "rehearsal" if self.rehearse else "measured"


def run(options: Options) -> int:
    """Do what is missing in `options.out`, write the table, and say how many items failed.

    Raises:
        ConfigError: the folder holds another kind of run, or another one is at work in it.
    """
    check_writable(options.out, folder=True)
    lock = lock_folder(options.out)
    if lock is None:
        raise ConfigError(
            f"{options.out}: another run is at work there; wait for it, or choose another --out"
        )
    with lock:
        ends = _earlier(options)
        begun, failed = time.monotonic(), []
        chosen = [item for item in ITEMS if not options.items or item.number in options.items]
        for item, seconds in _with_deadlines(options, [i for i in chosen if i.number not in ends], begun):
            print(f"{item.number:>2} {item.title} (at most {seconds:.0f} s)", flush=True)
            ends[item.number] = end = _run_item(item, options, seconds)
            _write(options, ends)
            print(f"   {end['status']} in {end['seconds']} s", flush=True)
            failed += [item.number] if end["status"] != "done" else []
        _write(options, ends)
    table = write_table(options.out, [ends[n] for n in sorted(ends)], options.kind)
    print(table.read_text())
    if failed:
        print(
            f"{len(failed)} of {len(chosen)} items failed: {', '.join(map(str, failed))}; see {options.out}/NN/{LOG}"
        )
    return 1 if failed else 0


def _with_deadlines(options: Options, items: Sequence[Item], begun: float) -> Iterator[tuple[Item, float]]:
    """Each item gets its share of the time that is left, so that what one saves serves the others."""
    for place, item in enumerate(items):
        left = 60 * options.minutes - (time.monotonic() - begun)
        share = item.seconds / sum(other.seconds for other in items[place:])
        # Later items keep what they need: an item never takes more than twice its own.
        least = max(5.0, min(left * share * 1.5, left, 2 * item.seconds))
        yield item, REHEARSAL_S if options.rehearse else least


def _run_item(item: Item, options: Options, seconds: float) -> dict[str, Any]:
    folder = options.out / f"{item.number:02}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.worker",
        str(item.number),
        "--out",
        str(folder.resolve()),
    ]
    command += ["--rehearse"] * options.rehearse + ["--profile"] * options.profile
    environment = {**os.environ, "TRITON_INTERPRET": "1" if options.rehearse else "0"}
    if options.rehearse:
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    (folder / FIGURES).unlink(missing_ok=True)
    begun = time.monotonic()
    with (folder / LOG).open("wb") as log:
        process = psutil.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT
        )
        try:
            code = process.wait(seconds)
        except psutil.TimeoutExpired:
            code = None
        finally:
            _end(process)
    status = "timeout" if code is None else "done" if code == 0 else "failed"
    found = (
        [json.loads(line) for line in (folder / FIGURES).read_text().splitlines()]
        if (folder / FIGURES).exists()
        else []
    )
    return {
        "item": item.number,
        "title": item.title,
        "status": status,
        "seconds": round(time.monotonic() - begun, 1),
        "kind": options.kind,
        "commit": commit(),
        "reason": "" if status == "done" else _last_line(folder / LOG),
        "figures": found,
    }


def _end(process: psutil.Process) -> None:
    """The process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        family = [*process.children(recursive=True), process]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "no output"


def _earlier(options: Options) -> dict[int, dict[str, Any]]:
    """Ends of items that are done in the folder already."""
    path = options.out / RESULTS_FILE
    if not path.exists():
        return {}
    try:
        ends = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kinds = {end["kind"] for end in ends}
        done = {end["item"]: end for end in ends if end["status"] == "done"}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: not results of this benchmark; choose another --out") from None
    if kinds - {options.kind}:
        raise ConfigError(f"{path}: holds figures of another kind ({', '.join(kinds)}); choose another --out")
    return done


def _write(options: Options, ends: dict[int, dict[str, Any]]) -> None:
    lines = [json.dumps(ends[number]) for number in sorted(ends)]
    write_atomic(options.out / RESULTS_FILE, "".join(f"{line}\n" for line in lines))
