"""The body of a completion: one finished reply, or a prompt's log-probs, and what it cost; or why there is none."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from sip_engine.llm.untrusted import neutral
from sip_engine.types import Failure

_FINISHED = ("stop", "eos", "eos_token")


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    index: int = 0
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(max_length=16)
    usage: Any = None


def read_completion(data: bytes) -> tuple[str | Failure, int]:
    """The text of the only choice, or a Failure, and the tokens read and written; never raises.

    A reply that did not end by itself (`finish_reason` "length", "content_filter", ...) is a Failure.
    """
    try:
        found = _Completion.model_validate_json(data, strict=True)
    except ValidationError:
        return Failure("the response is not a chat completion"), 0
    tokens = _tokens(found.usage)
    if len(found.choices) != 1:
        return Failure(f"the response has {len(found.choices)} choices, not the one asked for"), tokens
    (choice,) = found.choices
    if choice.index != 0:
        return Failure(f"the response numbers its only choice {choice.index}, not 0"), tokens
    if choice.finish_reason not in _FINISHED:
        return Failure(
            f"the reply did not end by itself (finish_reason {choice.finish_reason!r:.40})"
        ), tokens
    if not choice.message.content:
        return Failure("the reply is empty"), tokens
    return choice.message.content, tokens


class _LogProbs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]


class _PromptToken(BaseModel):
    logprob: float


class _Echo(BaseModel):
    logprobs: _LogProbs | None = None
    prompt_logprobs: list[dict[str, _PromptToken] | None] | None = None


class _EchoCompletion(BaseModel):
    choices: list[_Echo] = Field(min_length=1, max_length=1)
    usage: Any = None


def read_echo(data: bytes) -> tuple[str | Failure, int]:
    """A prompt's tokens and log-probs (nats, null where there is none): JSON, [[tokens], [log-probs]]; never raises.

    Both forms are read: `logprobs` of the echoed prompt, and `prompt_logprobs`, token id by token id.
    """
    try:
        found = _EchoCompletion.model_validate_json(data)
    except ValidationError:
        return Failure(f"the response is not a completion: {excerpt(data)}"), 0
    (choice,), spent = found.choices, _tokens(found.usage)
    if choice.prompt_logprobs:
        # The first of a position is the prompt's own token; others may follow it.
        firsts = [next(iter(one.items()), None) if one else None for one in choice.prompt_logprobs]
        names = [one[0] if one else "" for one in firsts]
        return json.dumps([names, [one[1].logprob if one else None for one in firsts]]), spent
    if choice.logprobs is None:
        return Failure(
            "the server gives no log-probs of the prompt: it must honour `echo` with `logprobs`, as vLLM does"
        ), spent
    length = found.usage.get("prompt_tokens") if isinstance(found.usage, dict) else None
    tokens, values = choice.logprobs.tokens, choice.logprobs.token_logprobs
    if not isinstance(length, int) or not 0 < length <= len(tokens) == len(values):
        return Failure(
            "the server's log-probs do not cover the prompt: it must honour `echo`, as vLLM does"
        ), spent
    return json.dumps([tokens[:length], values[:length]]), spent


def excerpt(data: bytes) -> str:
    """The beginning of what a server said, on one line, harmless to show."""
    return " ".join(neutral(data[:4000].decode(errors="replace")).split())[:200]


def _tokens(usage: Any) -> int:
    """Prompt and completion tokens of a usage field, 0 where it does not say."""
    if not isinstance(usage, dict):
        return 0
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return sum(c for c in counts if isinstance(c, int) and 0 <= c < 2**40)
