"""Each item in a process of its own with a deadline; what is done is not done again; the next runs when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.gpu.figures import Figure
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
    with own_folder(options.out):
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


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP become an exit, so that the item at work is ended too and holds no GPU."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def own_folder(out: Path) -> IO[str]:
    """Make the folder, and keep others out of it until what is returned is closed.

    Raises:
        ConfigError: another run is at work in it. DataError: it cannot be written.
    """
    check_writable(out, folder=True)
    lock = lock_folder(out)
    if lock is None:
        raise ConfigError(f"{out}: another run is at work there; wait for it, or choose another --out")
    return lock


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
            end_process(process)
    status = "timeout" if code is None else "done" if code == 0 else "failed"
    found, _ = json_lines(folder / FIGURES)  # the last may be cut off where the deadline came
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


def json_lines(path: Path) -> tuple[list[Any], list[int]]:
    """What the lines of a file hold, and the numbers of those that are no JSON; nothing if there is no file."""
    if not path.exists():
        return [], []
    found, damaged = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except ValueError:
            damaged.append(number)
    return found, damaged


def end_process(process: psutil.Process) -> None:
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
    ends, damaged = json_lines(path)
    try:
        kinds = {end["kind"] for end in ends}
        done = {int(end["item"]): end for end in ends if end["status"] == "done" and _is_whole(end)}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: not results of this benchmark; choose another --out") from None
    if damaged and not ends:
        raise ConfigError(f"{path}: not results of this benchmark; choose another --out")
    if damaged:
        print(f"{path}: line {damaged[0]} is cut off or damaged; what it held is done again")
    if kinds - {options.kind}:
        raise ConfigError(f"{path}: holds figures of another kind ({', '.join(kinds)}); choose another --out")
    return done


def _is_whole(end: dict[str, Any]) -> bool:
    """Whether the table can show it; what an older version wrote is done again."""
    names = {field.name for field in fields(Figure)}
    return {"title", "seconds", "commit", "reason", "figures"} <= end.keys() and all(
        names <= figure.keys() for figure in end["figures"]
    )


def _write(options: Options, ends: dict[int, dict[str, Any]]) -> None:
    lines = [json.dumps(ends[number]) for number in sorted(ends)]
    write_atomic(options.out / RESULTS_FILE, "".join(f"{line}\n" for line in lines))
