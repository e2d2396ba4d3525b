"""Documents that are not trained on, on request: copies of others, and what holds text of evaluation sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sip_engine.config.data import DataConfig
from sip_engine.data.contamination import EvaluationText, evaluation_items
from sip_engine.data.identity import Identities
from sip_engine.data.inventory import Counts, take_inventory
from sip_engine.data.near_duplicates import COPY, KEPT, NEAR, NearDuplicates
from sip_engine.data.token_files import TokenFiles
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import atomic_folder
from sip_engine.utils.progress import steps

FORMAT_VERSION = 1
CONTAMINATED = 3
REASONS = {COPY: "copies", NEAR: "near-duplicates", CONTAMINATED: "with text of evaluation sets"}


@dataclass(frozen=True)
class LeftOut:
    """What to leave out of one source: `labels` [num_documents] uint8, 0 for what stays."""

    path: Path

    @property
    def labels(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def note(self) -> str:
        """Counts by reason, in words."""
        found = np.bincount(self.labels, minlength=CONTAMINATED + 1)
        return (
            f"left out: {Counts({name: int(found[code]) for code, name in REASONS.items() if found[code]})}"
        )


def find_left_out(
    data: DataConfig, sources: Sequence[TokenFiles], held: TokenFiles | None, tokenizer: Tokenizer
) -> list[LeftOut] | None:
    """What to leave out of each source; None where nothing is asked for. Kept in the cache, and found again there.

    Of documents alike, the first stays, in the order of the sources; held-out documents go before all.

    Raises:
        ConfigError: datasketch is not installed; DataError: an evaluation set, or the cache, is out of reach.
    """
    if data.deduplicate is None and not data.decontaminate:
        return None
    entry = data.cache / "left_out" / _key(data, sources, held)
    paths = [entry / f"{number}.npy" for number in range(len(sources))]
    if not all(path.is_file() for path in paths):
        try:
            with atomic_folder(entry, keep=lambda found: True) as folder:
                for path, labels in zip(paths, _label(data, sources, held, tokenizer), strict=True):
                    np.save(folder / path.name, labels)
        except OSError as error:
            raise DataError(
                f"{entry.parent}: cannot be written ({error.strerror}); name another data.cache"
            ) from None
    return [LeftOut(path) for path in paths]


def _key(data: DataConfig, sources: Sequence[TokenFiles], held: TokenFiles | None) -> str:
    files = [file for path in data.decontaminate for file in take_inventory(path).files]
    sets = Identities(data.cache / "identities").of(files, lambda num_bytes: None)
    facts = [FORMAT_VERSION, data.deduplicate, sets, [source.key for source in sources]]
    return hashlib.sha256(json.dumps([*facts, held.key if held else None]).encode()).hexdigest()


def _label(
    data: DataConfig, sources: Sequence[TokenFiles], held: TokenFiles | None, tokenizer: Tokenizer
) -> list[np.ndarray]:
    every = [source.num_documents for source in sources]
    labels = [np.full(num, KEPT, np.uint8) for num in every]
    if data.deduplicate is not None:
        seen = NearDuplicates(data.deduplicate)
        with steps("comparing documents", sum(every) + (held.num_documents if held else 0)) as bar:
            for _ in seen.label(held) if held else ():
                bar.advance({})
            for mine, source in zip(labels, sources, strict=True):
                for number, label in enumerate(seen.label(source)):
                    mine[number] = label
                    bar.advance({})
    if data.decontaminate:
        known = EvaluationText(evaluation_items(data.decontaminate))
        with steps("looking for evaluation sets", sum(every)) as bar:
            for mine, source in zip(labels, sources, strict=True):
                for number in range(source.num_documents):
                    if known.is_in(tokenizer.decode(source.tokens(number))):
                        mine[number] = CONTAMINATED
                    bar.advance({})
    return labels
