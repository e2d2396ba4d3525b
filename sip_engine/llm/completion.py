"""The body of a chat completion: one finished reply and its tokens, or why there is none."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, ValidationError

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


def _tokens(usage: Any) -> int:
    """Prompt and completion tokens of a usage field, 0 where it does not say."""
    if not isinstance(usage, dict):
        return 0
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return sum(c for c in counts if isinstance(c, int) and 0 <= c < 2**40)
