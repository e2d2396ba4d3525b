"""The body of a completion: one finished reply, or a prompt's log-probs, and what it cost; or why there is none."""

from __future__ import annotations

import html
import json
import re
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from sip_engine.llm.untrusted import neutral
from sip_engine.types import Failure

_CUT = ("length", "max_tokens", "max_output_tokens", "model_length", "max_length", "token_limit")
_WITHHELD = ("content_filter", "safety", "recitation", "blocklist", "refusal", "error", "abort")
_CALLS = ("tool_calls", "function_call", "tool_use")
_SHOWN = 200
SAID = "; it said: "
"""Stands in a failure's reason in front of the server's own words."""


class Tokens(NamedTuple):
    """What a server says that a request took: tokens of the prompt, and of the reply."""

    read: int = 0
    written: int = 0


class _Part(BaseModel):
    """A part of a message; `text` of those that are none of the reply is not read."""

    type: str = "text"
    text: Any = None


class _Message(BaseModel, extra="allow"):
    content: str | list[_Part | str] | None = None
    refusal: Any = None


class _Choice(BaseModel):
    index: int | None = 0
    message: _Message = Field(default_factory=_Message)
    text: Any = None
    """Of a server that answers a chat in the form of plain completions."""
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(max_length=16)
    usage: Any = None


def read_completion(data: bytes, max_tokens: int | None = None) -> tuple[str | Failure, Tokens]:
    """The text of the only choice, or a Failure, and the tokens read and written; never raises.

    A reply that was cut off or withheld (`finish_reason` "length", "content_filter", ...) is a Failure; a server may
    leave the reason out or use a word of its own. `max_tokens`, the request's, is named in the remedy. Every Failure
    ends with the beginning of what the server said.
    """
    try:
        found = _Completion.model_validate_json(data.removeprefix(b"\xef\xbb\xbf"), strict=True)
    except ValidationError:
        return _lost("the response is not a chat completion", data), Tokens()
    tokens = _tokens(found.usage)
    if len(found.choices) != 1:
        return _lost(f"the response has {len(found.choices)} choices, not the one asked for", data), tokens
    (choice,) = found.choices
    if choice.index not in (0, None):
        return Failure(f"the response numbers its only choice {choice.index}, not 0"), tokens
    text, reason = _text_of(choice), (choice.finish_reason or "").lower()
    if reason in _CUT:
        return _lost(
            f"the reply did not end by itself (finish_reason {choice.finish_reason!r}): {_remedy(max_tokens)}",
            text or _thoughts(choice),
        ), tokens
    if reason in _WITHHELD or reason in _CALLS:
        words = text or choice.message.refusal or data
        return _lost(
            f"the reply did not end by itself (finish_reason {choice.finish_reason!r:.40})", words
        ), tokens
    if text:
        return text, tokens
    if choice.message.refusal:
        return _lost("the reply is empty: the model refuses", choice.message.refusal), tokens
    if thoughts := _thoughts(choice):
        return _lost(
            "the reply is empty: the answer went to the model's reasoning. Turn thinking off "
            "(extra_body = {chat_template_kwargs = {enable_thinking = false}}), correct the server's reasoning "
            f"parser, or {_remedy(max_tokens)}",
            thoughts,
        ), tokens
    return _lost("the reply is empty", data), tokens


def _remedy(max_tokens: int | None) -> str:
    known = f" = {max_tokens}" if max_tokens else ""
    return f"raise max_tokens{known}, which is short for a model that reasons"


def _text_of(choice: _Choice) -> str:
    """The text of a message: its content, or the text parts of it."""
    content = choice.message.content
    if isinstance(content, list):
        texts = [
            part if isinstance(part, str) else part.text if part.type in ("text", "output_text") else None
            for part in content
        ]
        return "".join(text for text in texts if isinstance(text, str))
    return content or (choice.text if isinstance(choice.text, str) else "")


def _thoughts(choice: _Choice) -> str:
    """What stands beside the content by a name such as reasoning, reasoning_content or thinking."""
    beside = (choice.message.model_extra or {}).items()
    found = (text for name, text in beside if name.startswith(("reason", "think", "thought")))
    return next((text for text in found if isinstance(text, str) and text), "")


def _lost(reason: str, said: bytes | str | Any) -> Failure:
    words = server_words(said) if isinstance(said, bytes) else one_line(str(said))
    return Failure(f"{reason}{SAID}{words}" if words else reason)


class _LogProbs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]


class _PromptToken(BaseModel):
    logprob: float


class _Echo(BaseModel):
    logprobs: _LogProbs | dict[str, Any] | None = None
    """Some servers answer in the form of their chats, with what they wrote alone."""
    prompt_logprobs: list[dict[str, _PromptToken] | None] | None = None


class _EchoCompletion(BaseModel):
    choices: list[_Echo] = Field(min_length=1, max_length=1)
    usage: Any = None


def read_echo(data: bytes) -> tuple[str | Failure, Tokens]:
    """A prompt's tokens and log-probs (nats, null where there is none): JSON, [[tokens], [log-probs]]; never raises.

    Both forms are read: `logprobs` of the echoed prompt, and `prompt_logprobs`, token id by token id.
    """
    try:
        found = _EchoCompletion.model_validate_json(data)
    except ValidationError:
        return Failure(f"the response is not a completion{SAID}{server_words(data)}"), Tokens()
    (choice,), spent = found.choices, _tokens(found.usage)
    if choice.prompt_logprobs:
        # The first of a position is the prompt's own token; others may follow it.
        firsts = [next(iter(one.items()), None) if one else None for one in choice.prompt_logprobs]
        names = [one[0] if one else "" for one in firsts]
        return json.dumps([names, [one[1].logprob if one else None for one in firsts]]), spent
    if not isinstance(choice.logprobs, _LogProbs):
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


def server_words(data: bytes) -> str:
    """The beginning of what a server said, on one line: an error's message, the text of a page, else the body."""
    text = data[:65536].decode("utf-8-sig", errors="replace")
    try:
        said = _message(json.loads(text))
    except (ValueError, RecursionError):
        said = ""
    if not said and re.match(r"\s*<(?:!doctype|html|head|body)", text, re.IGNORECASE):
        hidden = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.DOTALL | re.IGNORECASE)
        said = html.unescape(re.sub(r"<[^>]*>", " ", hidden))
    return one_line(said or text)


def _message(value: Any) -> str:
    """The message within an error's JSON, in the forms that servers give it; "" where there is none."""
    match value:
        case str():
            return value
        case {"error": inner} | {"message": inner} | {"detail": inner} | {"errors": inner} if inner:
            return _message(inner)
        case {"loc": [*where], "msg": str(what)}:
            return f"{'.'.join(map(str, where))}: {what}"
        case [_, *_]:
            return "; ".join(filter(None, map(_message, value)))
    return ""


def one_line(text: str) -> str:
    """The beginning of a text, harmless to show."""
    return " ".join(neutral(text[:4000]).split())[:_SHOWN]


def _tokens(usage: Any) -> Tokens:
    """Of a usage field, 0 where it does not say."""
    if not isinstance(usage, dict):
        return Tokens()
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return Tokens(*(c if isinstance(c, int) and 0 <= c < 2**40 else 0 for c in counts))
