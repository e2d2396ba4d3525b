"""A run's timeline for Perfetto and chrome://tracing, and which process was the slowest.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (complete events, "X").
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sip_engine.monitoring.slow import PHASES
from sip_engine.monitoring.timeline import RankTimeline, read_timeline
from sip_engine.utils.errors import ConfigError, DataError
from sip_engine.utils.files import write_atomic

LAST_STEPS = 200


@dataclass(frozen=True)
class Slowest:
    """The process that worked longest by itself over some steps."""

    rank: int
    host: str
    seconds: float
    others: float
    """Median of the other processes, seconds; 0 where there is none."""
    phase: str
    """Where it lost most against the others."""

    def __str__(self) -> str:
        where = f"rank {self.rank}" + (f" ({self.host})" if self.host else "")
        times = f"{self.seconds / self.others:.2f} times" if self.others else "beside"
        return (
            f"slowest: {where}, {self.seconds:.2f} s of its own work, {times} the median of the others "
            f"({self.others:.2f} s), most of the difference in {self.phase}"
        )


def slowest(ranks: Sequence[RankTimeline], steps: range) -> Slowest | None:
    """Of those `steps`, by what a process does by itself (`slow.PHASES`); None with fewer than two processes."""
    own = [_own_seconds(one, steps) for one in ranks]
    if len(own) < 2:
        return None
    totals = [sum(one.values()) for one in own]
    at = max(range(len(own)), key=lambda n: totals[n])
    others = [one for n, one in enumerate(own) if n != at]
    usual = {phase: median(one[phase] for one in others) for phase in PHASES}
    phase = max(PHASES, key=lambda name: own[at][name] - usual[name])
    return Slowest(ranks[at].rank, ranks[at].host, totals[at], median(sum(o.values()) for o in others), phase)


def write_trace(run: Path, out: Path, steps: str = "") -> str:
    """Write `out`; returns a line on what it holds.

    Raises:
        ConfigError: `steps` is not FIRST:LAST. DataError: the run has no timeline, or none of these steps.
    """
    wanted = _range(steps)
    ranks = read_timeline(run)
    made = [one.step for rank in ranks for one in rank.made]
    if not made:
        raise DataError(
            f"{run}: holds no timeline; give the folder of a run that had tracking.timeline_every above 0"
        )
    wanted = wanted or range(max(made) - LAST_STEPS + 1, max(made) + 1)
    events = [event for rank in ranks for event in _events(rank, wanted)]
    shown = sorted({step for step in made if step in wanted})
    if not shown:
        raise DataError(
            f"{run}: its timeline is of steps {min(made)} to {max(made)}; --steps {steps} holds none of them"
        )
    write_atomic(out, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":")))
    found = slowest(ranks, wanted)
    said = f"trace {out}: steps {shown[0]} to {shown[-1]} of {len(ranks)} process{'es' * (len(ranks) != 1)}"
    return said if found is None else f"{said}; {found}"


def _events(rank: RankTimeline, steps: range) -> list[dict[str, Any]]:
    """Microseconds since the epoch; a process in Perfetto is one of ours, its only thread the loop."""
    name = f"rank {rank.rank}" + (f" on {rank.host}" if rank.host else "")
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": rank.rank, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": rank.rank, "args": {"sort_index": rank.rank}},
        {"ph": "M", "name": "thread_name", "pid": rank.rank, "tid": 0, "args": {"name": "loop"}},
    ]
    times = Counter[int]()
    for one in rank.made:
        if one.step not in steps:
            continue
        times[one.step] += one.is_update
        for phase, begin, end in one.spans:
            event = {"ph": "X", "name": phase, "cat": "step", "pid": rank.rank, "tid": 0}
            event |= {"ts": round(begin * 1e6), "dur": round((end - begin) * 1e6)}
            events.append({**event, "args": {"step": one.step, "making": max(1, times[one.step])}})
    return events


def _own_seconds(rank: RankTimeline, steps: range) -> dict[str, float]:
    found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for one in rank.made:
        if one.step in steps:
            for phase, begin, end in one.spans:
                if phase in found:
                    found[phase] += end - begin
    return found


def _range(text: str) -> range | None:
    if not text:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise ConfigError(f"--steps {text}: must be FIRST:LAST, such as 10:20")
    return range(int(first), int(last) + 1)
