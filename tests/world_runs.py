"""A small run in the world, and what it recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sip_engine.config.parse import parse_config
from sip_engine.config.schema import RunConfig
from sip_engine.monitoring.records import read_records

STEPS = 4
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 48,
    "max_context": 64,
}


def run_config(folder: Path, **changes: Any) -> RunConfig:
    """Self-improving pretraining from scratch on a few dozen documents of the world."""
    values: dict[str, Any] = {
        "out": folder / "run",
        "steps": STEPS,
        "batch_size": 4,
        "model": MODEL,
        "world": {"train_documents": 80, "test_documents": 20},
        "data": {
            "suffix_tokens": 12,
            "max_prefix_tokens": 40,
            "min_prefix_tokens": 8,
            "vocab_size": 400,
            "cache": folder / "cache",
        },
        "candidates": [{"original": True, "rewrite": True, "rollouts": 3}],
        "judge": {"backend": "world"},
        "rewriter": {"backend": "world"},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1, "eps": 1e-6},
        "checkpoint": {"every": 2},
        "eval": {"every": 2, "num_prefixes": 6},
    }
    return parse_config(values | changes, "test")


def metrics(folder: Path, run: str = "run") -> list[dict[str, float]]:
    """All recorded metrics without times and what else is the machine's."""
    rows = read_records(folder / run / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if k != "elapsed" and not k.startswith(("seconds/", "machine/"))}
        for row in rows
    ]


def pools(folder: Path) -> list[dict[str, Any]]:
    return list(read_records(folder / "run" / "pools.jsonl"))
