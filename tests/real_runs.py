"""`sip real` in small: a model of two steps, text of twenty words, and the shipped settings with small numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL_MODEL

from sip_engine.config.files import shipped_configs
from sip_engine.config.parse import parse_config
from sip_engine.distributed.mesh import Mesh
from sip_engine.experiments.real import plan
from sip_engine.train import train


def make_small_checkpoint(folder: Path, mesh: Mesh) -> Path:
    """A language model of two steps, with a tokenizer of its own."""
    write_real_text(folder / "text.jsonl", 60)
    values: dict[str, Any] = {
        "out": folder / "run",
        "steps": 2,
        "batch_size": 4,
        "model": {**SMALL_MODEL.model_dump(), "max_context": 160},
        "data": {
            "path": folder / "text.jsonl",
            "holdout": 0.1,
            "vocab_size": 300,
            "suffix_tokens": 12,
            "max_prefix_tokens": 24,
            "min_prefix_tokens": 8,
            "cache": folder / "cache",
        },
        "objective": {"kind": "next_token"},
        "eval": {"generate": False, "num_prefixes": 4},
        "checkpoint": {"every": 0},
    }
    return train(parse_config(values, "test"), mesh)


def write_real_text(path: Path, documents: int) -> None:
    draw = np.random.default_rng(3)
    words = "the array value of a function returns sum mean order axis list input is in for with not given"
    rows = [" ".join(draw.choice(words.split(" "), 90)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def use_tiny_configs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped settings with small numbers in the place of large ones, written to `folder`."""
    shutil.copytree(shipped_configs() / "real", folder / "real")
    small = {
        "shared.toml": {"suffix_tokens = 32": "suffix_tokens = 12",
                        "max_prefix_tokens = 96": "max_prefix_tokens = 24",
                        "min_prefix_tokens = 48": "min_prefix_tokens = 8"},
        "scratch_base.toml": {"steps = 240": "steps = 30", "vocab_size = 4096": "vocab_size = 300",
                              "num_layers = 4": "num_layers = 1", "hidden_size = 192": "hidden_size = 24"},
        "judge_documents.toml": {"max_prefix_tokens = 48": "max_prefix_tokens = 16",
                                 "min_prefix_tokens = 24": "min_prefix_tokens = 8"},
        "judge_warm.toml": {"max_prefix_tokens = 176": "max_prefix_tokens = 150"},
    }  # fmt: skip
    for name, changes in small.items():
        text = (folder / "real" / name).read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (folder / "real" / name).write_text(text)
    monkeypatch.setattr(plan, "shipped_configs", lambda: folder)


def by_letters(given: Any) -> np.ndarray:
    rows = np.array([[text.count(letter) + 0.1 for letter in "aeinorst "] for text in given], np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
