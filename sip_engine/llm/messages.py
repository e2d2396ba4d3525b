"""The messages of a chat, and a reply to them that is one JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from sip_engine.types import Failure

Format = Literal["json_schema", "verdict_line", "word"]
"""How a model is asked to reply."""
MAX_REPLY_CHARS = 100_000
"""A longer reply is a failure."""


def chat_messages(system: str, user: str, system_role: bool) -> list[dict[str, str]]:
    """Two messages, or one: without a system role the rules stand at the head of the user's message."""
    if not system:
        return [{"role": "user", "content": user}]
    if system_role:
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return [{"role": "user", "content": f"{system}\n\n{user}"}]


def read_object(reply: str, keys: Sequence[str], mark: str) -> dict[str, str] | Failure:
    """A reply that is one JSON object of strings with these keys, each once, and the mark as its `id`."""
    try:
        value = json.loads(reply, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return Failure("the reply is not one JSON object")
    if not isinstance(value, dict) or value.keys() != set(keys):
        return Failure("the reply is not a JSON object with the keys asked for, each once")
    if not all(isinstance(field, str) for field in value.values()):
        return Failure("the reply's fields are not all strings")
    return value if value["id"] == mark else Failure("the reply has a wrong mark")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    """None for an object that names a key twice: which of the two was meant?"""
    value = dict(pairs)
    return value if len(value) == len(pairs) else None
