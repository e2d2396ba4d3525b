"""A tiny task for a judge in training: prompts of three letters, and the settings of a run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import SMALL_MODEL

from sip_engine.config.parse import parse_config
from sip_engine.config.schema import RunConfig
from sip_engine.data.tokenizer import Tokenizer


def write_task(folder: Path) -> None:
    """Prompts of three letters; the answer is `yes` where the first is an a, but at random in warm.jsonl."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 64), ("eval", 24), ("warm", 64)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                prompt = "".join(rng.choice(list("ab"), 3))
                answer = "yes" if (rng.random() < 0.5 if name == "warm" else prompt[0] == "a") else "no"
                file.write(json.dumps({"prompt": prompt, "answer": answer, "kind": "letters"}) + "\n")
    Tokenizer.train(["yes no a b ab ba aab bba"] * 20, 280, folder / "tokenizer.model")


def task_config(folder: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "out": folder / "run",
        "task": "judge",
        "steps": 3,
        "batch_size": 6,
        "model": SMALL_MODEL.model_dump(),
        "data": {
            "path": folder / "train.jsonl",
            "eval_path": folder / "eval.jsonl",
            "tokenizer": folder / "tokenizer.model",
            "max_prefix_tokens": 8,
            "min_prefix_tokens": 1,
            "suffix_tokens": 6,
        },
        "objective": {"kind": "grpo", "generations": 6, "loss_on": "suffix"},
        "optimizer": {"lr": 1e-2, "warmup_steps": 1},
        "checkpoint": {"every": 2},
        "eval": {"every": 0, "num_prefixes": 24},
    }
    return parse_config(values | changes, "test")
