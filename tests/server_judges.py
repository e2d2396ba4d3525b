"""A judge that asks a test server, its questions, and what it answered."""

from __future__ import annotations

import asyncio
from typing import Any

from fault_server import BAD, GOOD, FaultServer

from sip_engine.config.judge import JudgeServerConfig
from sip_engine.judges.server import ServerJudge
from sip_engine.types import (
    Failure,
    Judgment,
    PairQuestion,
    Question,
    SafetyQuestion,
    Score,
)

BACKOFF = 0.25
PAIR = PairQuestion("p", f"a {GOOD}", "nothing")


class Waits(list[float]):
    """Notes how long the client would have waited, and does not."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)
        await asyncio.sleep(0)


def settings(server: FaultServer, **changes: Any) -> JudgeServerConfig:
    values = {"url": server.url, "model": "rule", "backoff_s": BACKOFF, "request_s": 20, "batch_s": 60}
    return JudgeServerConfig.model_validate(values | changes)


def judge(server: FaultServer, waits: Waits | None = None, **changes: Any) -> ServerJudge:
    return ServerJudge(settings(server, **changes), sleep=Waits() if waits is None else waits)


def several(number: int) -> list[Question]:
    """Different questions; the rule calls every third unsafe."""
    return [SafetyQuestion(f"number {n} {BAD if n % 3 == 0 else 'bird'}") for n in range(number)]


def value(judgment: Judgment) -> float:
    assert isinstance(judgment, Score), judgment
    return judgment.value


def failure(judgment: Judgment) -> str:
    assert isinstance(judgment, Failure), judgment
    return judgment.reason
