"""A baseline's evaluation kept on disk: runs that are all measured against one policy ask it once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.held_out import Evaluation
from sip_engine.evaluation.intervals import Estimate
from sip_engine.policy.checkpoint import MANIFEST, resolve_checkpoint
from sip_engine.types import Sample
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import read_json, sha256_of, write_json

_DECIDING = ("data", "world", "judge", "sampler", "parallel")
"""Sections of the settings that decide the answers to given samples (the heuristic judge learns from documents)."""


def kept_evaluation(
    folder: Path,
    checkpoint: Path,
    cfg: RunConfig,
    samples: Sequence[Sample],
    mesh: Mesh,
    ask: Callable[[], Evaluation],
) -> Evaluation:
    """The evaluation of a checkpoint that `folder` holds; where it holds none, `ask` makes it and it is kept.

    A file is named by a digest of this package's version, of the checkpoint, of a local judge's, of the samples and
    of all settings that decide the answers, so that none is read for other weights or other questions. What the
    judge failed at is not kept. All processes of the mesh call this together.

    Raises:
        DataError: a file there is none of ours, or cannot be written.
    """
    settings = cfg.model_dump(mode="json")
    judge = cfg.judge.local.checkpoint if cfg.judge.backend == "local" else None
    decides = {
        "version": version("sip-engine"),
        "settings": {name: settings[name] for name in _DECIDING},
        "checkpoints": [sha256_of(resolve_checkpoint(p) / MANIFEST) for p in (checkpoint, judge) if p],
        "samples": [(s.prefix_ids.tolist(), s.suffix_ids.tolist()) for s in samples],
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    path = folder / f"{digest[:24]}.json"
    found = mesh.broadcast(_from_json(path) if mesh.is_main and path.is_file() else None)
    if found is None:
        found = ask()
        if mesh.is_main and not found.figures["judge_failure_rate"]:
            write_json(path, _to_json(found))
    return found


def _to_json(found: Evaluation) -> dict[str, Any]:
    return {
        "figures": found.figures,
        "continuations": found.continuations,
        "estimates": {name: one.to_json() for name, one in found.estimates.items()},
        "table": {name: sums.tolist() for name, sums in found.table.items()},
    }


def _from_json(path: Path) -> Evaluation:
    found = read_json(path)
    try:
        return Evaluation(
            figures={name: float(value) for name, value in found["figures"].items()},
            continuations=[str(text) for text in found["continuations"]],
            estimates={name: Estimate(**one) for name, one in found["estimates"].items()},
            table={name: np.array(sums, np.float64) for name, sums in found["table"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: not a kept evaluation ({error}); remove it to make it anew") from None
