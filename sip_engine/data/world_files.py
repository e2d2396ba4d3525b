"""The synthetic world's documents as files: written where they are not, or are not what was written."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from sip_engine.config.schema import WorldConfig
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import read_json, sha256_of, write_json, write_jsonl
from sip_engine.world import World, write_documents

_HASHES = "sha256.json"


def world_documents(world: World, spec: WorldConfig, cache: Path, *, write: bool) -> tuple[Path, Path]:
    """The files of training and test documents under `cache`, which only depend on the numbers in their name.

    write: see to it that they are there; else another process does.
    """
    numbers = (
        spec.seed,
        spec.num_people,
        spec.people_per_document,
        spec.train_documents,
        spec.test_documents,
    )
    name = "-".join(["world", *map(str, numbers)])
    folder = cache / (name if spec.split == "train" else f"{name}-{spec.split}")
    # The rewriter's documents are more of the judge's kind, drawn with another seed.
    split, seed = ("judge", spec.seed + 1) if spec.split == "rewriter" else (spec.split, spec.seed)
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    if not write:
        return train, test
    known = _known(folder)
    for path, part, count in ((train, split, spec.train_documents), (test, "test", spec.test_documents)):
        if path.name not in known or not path.is_file() or known[path.name] != sha256_of(path):
            documents = write_documents(world, part, count, seed)
            write_jsonl(path, ({"text": d.text, "style": d.style} for d in documents))
    found = {path.name: sha256_of(path) for path in (train, test)}
    if found != known:
        write_json(folder / _HASHES, found)
    return train, test


def _known(folder: Path) -> dict[str, Any]:
    with suppress(DataError):
        found = read_json(folder / _HASHES)
        return found if isinstance(found, dict) else {}
    return {}
