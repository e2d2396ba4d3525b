"""What a run writes down: metrics, candidate pools with their verdicts and generations as JSONL; trackers show it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from pydantic import BaseModel, Field

from sip_engine.distributed.sharing import interleave
from sip_engine.monitoring.curves import LATEST_POOLS, Curves, short_floats
from sip_engine.monitoring.trackers.base import Trackers
from sip_engine.types import Candidate, Choice, Sample, Verdict
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_jsonl
from sip_engine.utils.jsonl import read_jsonl
from sip_engine.utils.regular import open_regular

if TYPE_CHECKING:
    from sip_engine.config.schema import RunConfig
    from sip_engine.distributed.mesh import Mesh

METRICS = "metrics.jsonl"
POOLS = "pools.jsonl"
GENERATIONS = "generations.jsonl"
_BLOCK = 2**22


class Mark(BaseModel, strict=True, frozen=True):
    """How far a file went at some moment, and what it held."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Records:
    """Appends to a run's files, and keeps in hand what its monitors look at.

    On resume, lines of steps that will be made again are dropped first; the rest is read once. `pools_every` is the
    number of steps between records of whole pools and of generations.
    """

    def __init__(
        self,
        folder: Path,
        *,
        from_step: int,
        enabled: bool,
        pools_every: int = 1,
        mesh: Mesh | None = None,
        cfg: RunConfig | None = None,
        marks: Mapping[str, Mark] | None = None,
    ) -> None:
        """mesh: the processes whose shares the first one writes; None where there is one only.

        cfg: names the trackers; None has none. marks: of the checkpoint that the run goes on from.

        Raises:
            DataError: a file does not hold what it held at the mark.
        """
        self._mesh = mesh
        self._held: list[tuple[str, list[dict[str, Any]]]] = []
        self.curves = Curves()
        """Of every metric so far."""
        self.latest_pools: deque[dict[str, Any]] = deque(maxlen=LATEST_POOLS)
        self._pools_every = pools_every
        self._files: dict[str, TextIO] = {}
        self._hashes: dict[str, Any] = {}
        self._trackers: Trackers | None = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, POOLS, GENERATIONS):
            _check_mark(folder / name, (marks or {}).get(name))
            _drop_from_step(folder / name, from_step)
            self._hashes[name] = _hash_of(folder / name)
            self._files[name] = open_regular(folder / name, "a", encoding="utf-8", buffering=1)
        for row in read_records(folder / METRICS):
            self.curves.add(row.pop("step"), row)
        self.latest_pools.extend(_latest_pools(folder / POOLS))
        if cfg is not None:
            self._trackers = Trackers(cfg, from_step)

    def marks(self) -> dict[str, Mark]:
        """What the files hold by now, for a checkpoint to know. Empty on processes that write none."""
        return {
            name: Mark(bytes=os.fstat(file.fileno()).st_size, sha256=self._hashes[name].hexdigest())
            for name, file in self._files.items()
        }

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line a step; nested names use `/`. Values must be finite numbers."""
        self.curves.add(step, values)
        self._append(METRICS, {"step": step, **values})
        if self._trackers is not None:
            self._trackers.log(step, values)

    def pools(
        self,
        step: int,
        samples: Sequence[Sample],
        pools: Sequence[Sequence[Candidate]],
        verdicts: Sequence[Verdict],
        choices: Sequence[Choice | None],
    ) -> None:
        """A step's pools, those of this process' share: prefix, candidates with scores and reward, pairs, choice.

        `verdicts` is empty where nothing was judged. `step` counts the updates made before it. They are written by
        `share`, in the order of the batch; where one process holds all of them, at once.
        """
        if step % self._pools_every:
            return
        judged = verdicts or [None] * len(samples)
        entries = [
            {"step": step + 1, **_pool_entry(sample, pool, verdict, choice)}
            for sample, pool, verdict, choice in zip(samples, pools, judged, choices, strict=True)
        ]
        self._hold(POOLS, entries)

    def generations(
        self,
        step: int,
        samples: Sequence[Sample],
        replies: Sequence[Sequence[str | None]],
        rewards: Sequence[Sequence[float | None]],
    ) -> None:
        """A step's prompts, those of this process' share, their generations and rewards; called as `pools`."""
        if step % self._pools_every:
            return
        entries = []
        for sample, texts, values in zip(samples, replies, rewards, strict=True):
            graded = [{"text": t, "reward": v} for t, v in zip(texts, values, strict=True)]
            entry = {"document": sample.document, "prompt": sample.prefix, "answer": sample.suffix}
            entries.append({"step": step + 1, **entry, "generations": graded})
        self._hold(GENERATIONS, entries)

    def share(self) -> None:
        """Have the first process write what all hold of pools and generations. A collective of the world."""
        held, self._held = self._held, []
        for name, entries in held:
            shares = [entries] if self._mesh is None else self._mesh.replicas_to_main(entries)
            for entry in interleave(shares) if shares and self._files else ():
                if name == POOLS:
                    self.latest_pools.append(short_floats(entry))
                self._append(name, entry)

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a line that could not be written has been said to be so
                file.close()
        if self._trackers is not None:
            self._trackers.close()

    def _hold(self, name: str, entries: list[dict[str, Any]]) -> None:
        self._held.append((name, entries))
        if self._mesh is None or self._mesh.dp.size == 1:
            self.share()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        """Raises DataError: it cannot be written; what was written before stays, cut at the last whole line."""
        if name not in self._files:
            return
        line = json.dumps(row, ensure_ascii=False) + "\n"
        self._hashes[name].update(line.encode())
        try:
            self._files[name].write(line)
        except OSError as error:
            raise DataError(
                f"{self._files[name].name}: cannot be written ({error.strerror}); free space there, then run the "
                "same command again: it goes on from the newest checkpoint"
            ) from None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a records file, in order; a last line cut short by a crash is left out, no file has none.

    Raises:
        DataError: a damaged line, or one without a whole number as its "step"; names file and line.
    """
    if not path.exists():
        return
    for number, row in read_jsonl(path, complete_lines=True):
        if type(row.get("step")) is not int:
            raise DataError(f'{path}:{number}: no "step", as records have; remove the line or the file')
        yield row


def checked_pool(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A recorded pool as `short_floats` leaves it. Raises DataError, which begins with `where`, if it is none."""
    candidates, pairs = row.get("candidates"), row.get("pairs", [])
    if (
        type(row.get("step")) is not int
        or not isinstance(row.get("prefix"), str)
        or not isinstance(candidates, list)
        or not all(isinstance(one, dict) for one in candidates)
        or not isinstance(pairs, list)
        or not all(_is_pair(pair, len(candidates)) for pair in pairs)
    ):
        raise DataError(f"{where}: not a recorded pool; remove the line or the file")
    return short_floats(row)


def _is_pair(pair: Any, num_candidates: int) -> bool:
    if not isinstance(pair, list) or len(pair) != 3:
        return False
    *numbers, win = pair
    known = all(type(number) is int and 0 <= number < num_candidates for number in numbers)
    return known and (win is None or isinstance(win, int | float))


def _latest_pools(path: Path) -> list[dict[str, Any]]:
    numbered = deque(read_jsonl(path, complete_lines=True) if path.exists() else (), maxlen=LATEST_POOLS)
    return [checked_pool(row, f"{path}:{number}") for number, row in numbered]


def _pool_entry(
    sample: Sample, pool: Sequence[Candidate], verdict: Verdict | None, choice: Choice | None
) -> dict[str, Any]:
    candidates = []
    for number, candidate in enumerate(pool):
        entry: dict[str, Any] = {"kind": candidate.kind, "text": candidate.text}
        if candidate.logprobs is not None:
            entry["logprob"] = round(float(candidate.logprobs.sum()), 4)
        if verdict is not None:
            entry |= {name: getattr(verdict, name)[number] for name in ("quality", "safety", "factuality")}
            entry["reward"] = verdict.rewards[number]
        candidates.append(entry)
    return {
        "document": sample.document,
        "cut": sample.cut,
        "prefix": sample.prefix,
        "candidates": candidates,
        "pairs": [list(pair) for pair in verdict.pairs] if verdict else [],
        "failures": list(verdict.failures) if verdict else [],
        "chosen": None if choice is None else choice.chosen,
        "rejected": None if choice is None else choice.rejected,
    }


def _hash_of(path: Path, size: int | None = None) -> Any:
    """A SHA-256 of the first `size` bytes of a file, or of all, that goes on with what is added."""
    digest = hashlib.sha256()
    left = path.stat().st_size if size is None and path.exists() else size or 0
    if left:
        with open_regular(path) as file:
            while block := file.read(min(left, _BLOCK)):
                digest.update(block)
                left -= len(block)
    return digest


def _check_mark(path: Path, mark: Mark | None) -> None:
    """Raise DataError where a file that is there does not begin with what the checkpoint knows it to begin with."""
    if mark is None or not path.is_file():
        return
    if path.stat().st_size < mark.bytes or _hash_of(path, mark.bytes).hexdigest() != mark.sha256:
        raise DataError(
            f"{path}: damaged or changed (not what the checkpoint knows); copy it anew, or remove it: the run "
            "then goes on without its records so far"
        )


def _drop_from_step(path: Path, step: int) -> None:
    if path.exists():
        write_jsonl(path, [row for row in read_records(path) if row["step"] < step])
