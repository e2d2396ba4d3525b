"""Builds the system and user messages of a chat request."""

from __future__ import annotations

from typing import Literal

Format = Literal["json_schema", "verdict_line", "word"]
"""How a model is asked to reply."""


def chat_messages(system: str, user: str, system_role: bool) -> list[dict[str, str]]:
    """Two messages, or one: without a system role the rules stand at the head of the user's message."""
    if not system:
        return [{"role": "user", "content": user}]
    if system_role:
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return [{"role": "user", "content": f"{system}\n\n{user}"}]
