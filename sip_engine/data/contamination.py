"""Which documents hold text of evaluation sets: thirteen words in a row of any of their items."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sip_engine.data.inventory import take_inventory
from sip_engine.data.permutation import mix64
from sip_engine.utils.errors import DataError

WORDS = 13
"""As GPT-3's authors have it (arXiv 2005.14165, appendix C)."""
FEWEST = 8
"""A shorter item is not looked for: its words may meet by chance. One between is looked for whole."""
_WORD = re.compile(r"\w+")
_CSV_CELL = 2**30


class EvaluationText:
    """The words of evaluation sets' items, to be found in documents: case and punctuation do not count."""

    def __init__(self, items: Iterable[str]) -> None:
        self._known: dict[int, np.ndarray] = {}
        self.num_items = self.num_short = 0
        """Items, and those of them that are too short to be looked for."""
        found: dict[int, list[np.ndarray]] = {}
        for item in dict.fromkeys(items):
            words = _hashed_words(item)
            self.num_items += 1
            self.num_short += len(words) < FEWEST
            length = min(WORDS, len(words))
            if length >= FEWEST:
                found.setdefault(length, []).append(_runs(words, length))
        self._known = {length: np.unique(np.concatenate(runs)) for length, runs in found.items()}

    def is_in(self, text: str) -> bool:
        """Whether a document holds some of it."""
        words = _hashed_words(text)
        return any(
            len(words) >= length and bool(np.isin(_runs(words, length), known).any())
            for length, known in self._known.items()
        )


def _hashed_words(text: str) -> np.ndarray:
    return np.array([hash(word) for word in _WORD.findall(text.lower())], np.int64).view(np.uint64)


def _runs(words: np.ndarray, length: int) -> np.ndarray:
    """A hash of each `length` words in a row."""
    hashed = np.zeros(len(words) - length + 1, np.uint64)
    for place in range(length):
        hashed = mix64(hashed ^ words[place : place + len(hashed)])
    return hashed


def evaluation_items(paths: Sequence[Path]) -> Iterator[str]:
    """Every text in files of evaluation sets: all strings of JSON, CSV and Parquet; paragraphs of text.

    Raises:
        DataError: a file cannot be read, or there is none.
    """
    for path in paths:
        for file in take_inventory(path).files:
            try:
                yield from _items(file)
            except (OSError, ValueError, pa.ArrowException, csv.Error, RecursionError) as error:
                cause = " ".join(str(error).split())
                raise DataError(
                    f"{file}: cannot be read as an evaluation set ({cause}); replace or remove the file"
                ) from None


def _items(file: Path) -> Iterator[str]:
    name = file.name.lower()
    if name.endswith(".parquet"):
        yield from _strings(pq.read_table(file).to_pylist())
        return
    with pa.input_stream(str(file), compression="detect") as stream:
        text = stream.read().decode("utf-8-sig")
    if ".csv" in name or ".tsv" in name:
        csv.field_size_limit(_CSV_CELL)
        delimiter = "\t" if ".tsv" in name else ","
        yield from _strings(list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)))
    elif ".json" in name or ".ndjson" in name:
        yield from _strings(_json(text))
    else:
        yield from (piece for piece in re.split(r"\n\s*\n", text) if piece.strip())


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for inner in value.values():
                yield from _strings(inner)
        case list():
            for inner in value:
                yield from _strings(inner)
