"""The judge behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import numpy as np

from sip_engine.config.judge import JudgeServerConfig
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.judges.mutual_information import (
    SILENT_ON,
    MutualInformation,
    Reading,
    TokenLogProbs,
    note_text,
)
from sip_engine.judges.parsing import read_verdict, settled
from sip_engine.judges.prompts import judge_prompt
from sip_engine.llm.client import Chat, ChatClient, Echo, Reply, json_schema, request_seed
from sip_engine.types import Cost, Failure, Judgment, Question, Score


class ServerJudge:
    """A `Judge` that asks a language model, each question in one request (method §rewards).

    `seed` tells one vote from another: it goes into the seed of every request, mixed with the question, so that
    two questions do not draw the same noise. Votes over the same texts share all of their prompt. What the cache
    knows, and a comparison of a text with itself (0.5), costs no call and no token.

    It may work on a thread beside the sampler (`overlap.RemoteJudge`).
    """

    name = "server"

    def __init__(
        self, cfg: JudgeServerConfig, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """`sleep` waits before a retry.

        Raises:
            ConfigError: the key's environment variable is not set.
            DataError: the cache cannot be used.
        """
        self.deterministic = cfg.temperature == 0 and "temperature" not in cfg.omit
        """Whether another seed is of no use: greedy replies repeat, as far as the server keeps to that."""
        self._cfg = cfg
        self._client = ChatClient(cfg, "judge.server", sleep=sleep)
        self.silent_on: tuple[type, ...] = ()
        self._information: MutualInformation | None = None
        if cfg.method == "mutual_information":
            self.deterministic, self.silent_on = True, SILENT_ON
            self._information = MutualInformation(
                EchoReader(self._client, cfg.max_prefix_chars), cfg.pair_temperature, cfg.copied_run
            )

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        """One Score of one vote, or Failure, a question, in order.

        Raises:
            EndpointError: the server cannot be used with these settings (wrong key, model or URL, or nothing
                listens there), found at the first question it is asked.
            asyncio.CancelledError: `stop` was called; replies that had come by then are in the cache.
        """
        values = [settled(question) for question in questions]
        if self._information is not None:
            found = self._information.judge(
                {n: questions[n] for n, value in enumerate(values) if value is None}
            )
            return [
                found[number] if value is None else Score(value, (value,), Cost())
                for number, value in enumerate(values)
            ]
        asked = [
            self._chat(question, seed)
            for question, value in zip(questions, values, strict=True)
            if value is None
        ]
        answers = iter(self._client.ask(asked))
        return [
            _judgment(next(answers)) if value is None else Score(value, (value,), Cost()) for value in values
        ]

    def stop(self) -> None:
        """Cut short what is being asked, and send nothing any more; from any thread, returns at once."""
        self._client.stop()

    def _chat(self, question: Question, seed: int) -> Chat[float]:
        cfg = self._cfg
        prompt = judge_prompt(
            question,
            key=str(cfg.seed),
            style=cfg.style,
            format=cfg.format,
            max_prefix_chars=cfg.max_prefix_chars,
        )
        return Chat(
            messages=prompt.messages(cfg.system_role),
            read=partial(read_verdict, prompt=prompt),
            seed=request_seed(cfg.seed, seed, prompt.mark),
            response_format=json_schema("verdict", prompt.schema) if prompt.format == "json_schema" else None,
        )


class EchoReader:
    """Reads through a server that gives a prompt's log-probs (`mutual_information.Reader`); a request a reading."""

    def __init__(self, client: ChatClient, max_prefix_chars: int) -> None:
        self._client, self._most = client, max_prefix_chars

    def read(self, readings: Sequence[Reading]) -> list[TokenLogProbs | Failure]:
        """One result a reading, in order; tokens are called what the server calls them."""
        asked = [Echo(self._prompt(reading), _token_logprobs) for reading in readings]
        return [
            one if isinstance(one, Failure) else TokenLogProbs(one.value[0], one.value[1], one.cost)
            for one in self._client.ask(asked)
        ]

    def _prompt(self, reading: Reading) -> str:
        note = note_text(reading.note) if reading.note else ""
        return note + reading.prefix[-self._most :] + reading.suffix


def _token_logprobs(reply: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The tokens and log-probs [tokens] of a prompt, as `read_echo` wrote them; NaN where there is none."""
    tokens, values = json.loads(reply)
    return tuple(tokens), np.array([np.nan if value is None else value for value in values], np.float64)


def open_judge(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> ServerJudge:
    """`judge.backend = "server"`."""
    del corpus, mesh
    return ServerJudge(cfg.judge.server)


def _judgment(answer: Reply[float] | Failure) -> Judgment:
    return Score(answer.value, (answer.value,), answer.cost) if isinstance(answer, Reply) else answer
