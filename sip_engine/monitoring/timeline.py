"""When each process was in which phase of which step: written while a run goes on, read by report and trace.

    timeline/rank_N.jsonl    {"step": 12, "at": 1790000000.25, "spans": [["data", 0.0, 0.01], ["judge", 0.01, 1.3]]}

`at` is the process' clock (seconds since the epoch), spans are [phase, seconds after `at`, seconds]. `update` ends
where a process has nothing left to do by itself; `exchange` is the sum of gradients with the others and the
optimizer. Of a step that is made again after a restart both makings are kept. The first line after a start names the
`host`.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sip_engine.utils import heartbeat
from sip_engine.utils.errors import DataError
from sip_engine.utils.jsonl import read_jsonl, tail_jsonl
from sip_engine.utils.progress import console
from sip_engine.utils.regular import open_regular

FOLDER = "timeline"
Span = tuple[str, float, float]
"""Phase; begin and end, by `time.perf_counter` where it is written, seconds since the epoch where it is read."""


class Timeline:
    """Appends this process' spans to its file. One that cannot be written is said once and gone on without."""

    def __init__(self, out: Path, rank: int, *, every: int) -> None:
        """every: steps between records; 0 writes nothing."""
        self._every = every
        self._path = out / FOLDER / f"rank_{rank}.jsonl"
        self._file: TextIO | None = None
        self._epoch = time.time() - time.perf_counter()

    def write(self, step: int, spans: Sequence[Span]) -> None:
        """Record the spans of the making of step number `step`, from 1, where it is time."""
        if self._every and step % self._every == 0:
            self._append(step, spans)

    def _append(self, step: int, spans: Sequence[Span]) -> None:
        begin = spans[0][1]
        shifts = [[name, round(start - begin, 4), round(end - start, 4)] for name, start, end in spans]
        line: dict[str, Any] = {"step": step, "at": round(self._epoch + begin, 4), "spans": shifts}
        try:
            file = self._file
            if file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                file = self._file = open_regular(self._path, "a", encoding="utf-8", buffering=1)
                line["host"] = socket.gethostname()
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as error:
            self._every = 0
            console.print(
                f"{self._path}: cannot be written ({error.strerror}); going on without it", soft_wrap=True
            )

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Record what stands between two steps, such as an evaluation."""
        begin = time.perf_counter()
        with heartbeat.phase(name):
            yield
        if self._every:
            self._append(step, [(name, begin, time.perf_counter())])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Made:
    """One making of a step on one process, or what stood after it."""

    step: int
    spans: tuple[Span, ...]

    @property
    def is_update(self) -> bool:
        """Whether it is a step, and not what stood between two."""
        return self.spans[0][0] == "data"

    @property
    def begin(self) -> float:
        return self.spans[0][1]

    @property
    def end(self) -> float:
        return max(end for _, _, end in self.spans)


@dataclass(frozen=True)
class RankTimeline:
    """What one process recorded."""

    rank: int
    host: str
    made: tuple[Made, ...]


def read_timeline(out: Path, *, whole_ranks: int | None = None) -> list[RankTimeline]:
    """All processes' timelines, by rank; empty where none was recorded.

    whole_ranks: of so many processes all is read, of the others the last part; None reads all.

    Raises:
        DataError: a damaged line.
    """
    paths = {}
    for path in (out / FOLDER).glob("rank_*.jsonl"):
        number = path.stem.removeprefix("rank_")
        if number.isdigit():
            paths[int(number)] = path
    whole = len(paths) if whole_ranks is None else whole_ranks
    return [_read_rank(rank, paths[rank], number < whole) for number, rank in enumerate(sorted(paths))]


def _read_rank(rank: int, path: Path, whole: bool) -> RankTimeline:
    host, made = "", []
    for row in (row for _, row in read_jsonl(path, complete_lines=True)) if whole else tail_jsonl(path):
        host = str(row.get("host", host))
        try:
            at = float(row["at"])
            spans = tuple((str(n), at + float(b), at + float(b) + float(s)) for n, b, s in row["spans"])
            made.append(Made(int(row["step"]), spans))
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}: holds what is not a step's spans; remove the file") from None
    return RankTimeline(rank, host, tuple(one for one in made if one.spans))
