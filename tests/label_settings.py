"""Settings from which prompts with known answers are made."""

from __future__ import annotations

from pathlib import Path

from sip_engine.config.parse import parse_config


def config(folder: Path, **changes):
    values = {
        "out": folder / "run",
        "world": {"train_documents": 150, "test_documents": 60},
        "data": {"suffix_tokens": 30, "max_prefix_tokens": 60, "min_prefix_tokens": 10, "vocab_size": 500},
        "model": {"max_context": 128},
        "judge": {"backend": "world"},
        "rewriter": {"backend": "world"},
        "eval": {"num_prefixes": 40},
    }
    values["data"]["cache"] = folder / "cache"
    return parse_config(values | changes, "test")
