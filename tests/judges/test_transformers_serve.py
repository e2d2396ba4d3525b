"""A real server: a judge trained here, exported, served by `transformers serve` on loopback, and asked over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_MODEL

from sip_engine.config.judge import JudgeServerConfig, LocalModelConfig
from sip_engine.config.parse import parse_config
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.huggingface.exporting import export_model
from sip_engine.judges.local import LocalJudge
from sip_engine.judges.server import ServerJudge
from sip_engine.llm.compact_prompts import compact_prompt
from sip_engine.llm.local_model import LocalModel
from sip_engine.policy.checkpoint import resolve_checkpoint
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.train import train
from sip_engine.types import PairQuestion, Question, SafetyQuestion, Score

WORDS = ["good", "bad", "dog", "fox", "jumps", "sleeps"]


def questions(seed: int, count: int) -> list[tuple[Question, str]]:
    """Safety: `bad` is unsafe. Pairs: the one without `bad` wins, if there is such a one."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " " + " ".join(rng.choice(WORDS, 3))

    made: list[tuple[Question, str]] = []
    while len(made) < count:
        first, second = text(), text()
        made.append((SafetyQuestion(first), "no" if "bad" in first else "yes"))
        if ("bad" in first) != ("bad" in second):
            made.append((PairQuestion("the", first, second), "2" if "bad" in first else "1"))
    return made[:count]


@pytest.fixture(scope="module")
def trained(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge after a few steps of next-token training on verdicts; right more often than not."""
    folder = tmp_path_factory.mktemp("serve")
    for name, seed, count in (("train", 0, 400), ("eval", 1, 20)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for question, answer in questions(seed, count):
                file.write(json.dumps({"prompt": compact_prompt(question), "answer": answer}) + "\n")
    Tokenizer.train([f"{' '.join(WORDS)} the yes no 1 2"] * 30, 300, folder / "tokenizer.model")
    cfg = parse_config(
        {
            "out": folder / "judge",
            "task": "judge",
            "steps": 60,
            "batch_size": 32,
            "model": SMALL_MODEL.model_dump(),
            "data": {
                "path": folder / "train.jsonl",
                "eval_path": folder / "eval.jsonl",
                "tokenizer": folder / "tokenizer.model",
                "max_prefix_tokens": 60,
                "min_prefix_tokens": 1,
                "suffix_tokens": 6,
            },
            "objective": {"kind": "next_token", "loss_on": "suffix"},
            "optimizer": {"lr": 5e-3, "warmup_steps": 4},
            "eval": {"every": 0},
        },
        "test",
    )
    train(cfg, mesh)
    return resolve_checkpoint(folder / "judge")


@contextmanager
def served(model: Path) -> Iterator[str]:
    """`transformers serve` on a free port of loopback; the base URL of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("transformers")),
        *(
            "serve",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--device",
            "cpu",
            "--log-level",
            "info",
        ),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    server = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert server.stdout is not None
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if "Uvicorn running" in line:
                break
        assert server.poll() is None, "".join(said)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
def test_a_served_judge_gives_the_local_ones_verdicts(mesh: Mesh, trained: Path, tmp_path: Path) -> None:
    asked = [question for question, _ in questions(2, 24)]
    policy, _ = FrozenPolicy.load(trained, mesh)
    local = LocalJudge(LocalModel(policy, LocalModelConfig(method="generate", max_new_tokens=6))).judge(asked)
    model = export_model(trained, tmp_path / "model")
    with served(model) as url:
        settings = JudgeServerConfig(
            url=url,
            model=str(model),
            style="compact",
            temperature=0.0,
            top_p=1.0,
            max_tokens=6,
            concurrency=2,
        )
        remote = ServerJudge(settings).judge(asked)
    values = [answer.value if isinstance(answer, Score) else answer.reason for answer in local]
    assert [answer.value if isinstance(answer, Score) else answer.reason for answer in remote] == values
    assert {0.0, 1.0} <= set(values)
    right = [
        value == float(answer in ("1", "yes"))
        for value, (_, answer) in zip(values, questions(2, 24), strict=True)
    ]
    assert sum(right) > 16
