"""What a run writes down: metrics as JSONL and TensorBoard, candidate pools with their verdicts as JSONL."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

METRICS = "metrics.jsonl"
POOLS = "pools.jsonl"
GENERATIONS = "generations.jsonl"


class Records:
    """Appends to a run's files; on resume, lines of steps that will be made again are dropped first."""

    def __init__(self, folder: Path, *, from_step: int, enabled: bool) -> None:
        self._files: dict[str, TextIO] = {}
        self._board = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, POOLS, GENERATIONS):
            _drop_from_step(folder / name, from_step)
            self._files[name] = (folder / name).open("a", encoding="utf-8", buffering=1)
        self._board = _summary_writer(folder / "tensorboard", from_step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line a step; nested names use `/`. Values must be finite numbers."""
        self._append(METRICS, {"step": step, **values})
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def pool(self, step: int, entry: Mapping[str, Any]) -> None:
        """One judged pool: prefix, candidates with scores and reward, comparisons, chosen and rejected."""
        self._append(POOLS, {"step": step, **entry})

    def generations(self, step: int, entry: Mapping[str, Any]) -> None:
        """One prompt of a task, its generations and their rewards."""
        self._append(GENERATIONS, {"step": step, **entry})

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if name in self._files:
            self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a records file; a last line cut short by a crash is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _drop_from_step(path: Path, step: int) -> None:
    if not path.is_file():
        return
    from sip_engine.utils.files import write_jsonl

    write_jsonl(path, [row for row in read_records(path) if row["step"] < step])


def _summary_writer(folder: Path, from_step: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=from_step)
