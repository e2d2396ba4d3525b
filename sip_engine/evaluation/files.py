"""What evaluations leave in a run's folder: every one's continuations, and the first one's as the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.held_out import Evaluation
from sip_engine.types import Sample
from sip_engine.utils.errors import ConfigError, DataError
from sip_engine.utils.files import sha256_of, write_jsonl
from sip_engine.utils.jsonl import read_jsonl

BASELINE = "baseline.jsonl"


def write_evaluation(folder: Path, step: int, result: Evaluation, samples: Sequence[Sample]) -> None:
    rows = [
        {"prefix": s.prefix, "original": s.suffix, "continuation": text}
        for s, text in zip(samples, result.continuations, strict=False)
        if s.labels is None
    ]
    write_jsonl(folder / "eval" / f"step_{step:08d}.jsonl", rows)
    if not (folder / BASELINE).is_file() or step == 0:
        write_jsonl(folder / BASELINE, rows)


def baseline_hash(folder: Path) -> str | None:
    """SHA-256 of the first evaluation's continuations, if there are any."""
    path = folder / BASELINE
    return sha256_of(path) if path.is_file() else None


def read_baseline(
    folder: Path, samples: Sequence[Sample], mesh: Mesh, expected: str | None = None
) -> list[str] | None:
    """The first evaluation's continuations of the same held-out samples; None where there are none.

    expected: their SHA-256, if it is known.

    Raises:
        ConfigError: they are of other samples. DataError: damaged.
    """
    rows: list[dict[str, Any]] | None = None
    if mesh.is_main:
        path = folder / BASELINE
        if expected and baseline_hash(folder) not in (expected, None):
            raise DataError(
                f"{path}: damaged (not what the checkpoint knows); copy it anew, or remove it: then the next "
                "evaluation is what the later ones are compared to"
            )
        rows = [row for _, row in read_jsonl(path)] if path.exists() else []
    rows = mesh.broadcast(rows)
    prefixes = [s.prefix for s in samples if s.labels is None]
    if rows and [row.get("prefix") for row in rows] != prefixes:
        raise ConfigError(
            f"{folder}: its first evaluation was of {len(rows)} other held-out prefixes than these {len(prefixes)}; "
            "leave eval.num_prefixes and the documents as they were, or choose another --out"
        )
    return [str(row.get("continuation", "")) for row in rows] if rows else None
