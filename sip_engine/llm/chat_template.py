"""A model's own chat template: messages as the ids it was post-trained on, their texts never special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from sip_engine.data.tokenizer import Tokenizer
from sip_engine.utils.errors import ConfigError

_PLACE = "\ue000{}\ue001"
_PLACES = re.compile("\ue000(\\d+)\ue001")


class ChatTemplate:
    """Turns messages into ids by the Jinja template that came with an imported model, in Jinja's sandbox.

    The same ids as transformers' `apply_chat_template` with `add_generation_prompt`, but that the name of a special
    token within a message is plain text.
    """

    def __init__(self, tokenizer: Tokenizer, what: str) -> None:
        """`what` names the model in errors. Raises ConfigError: it has no template, or one that cannot be read."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        files = tokenizer.files()
        source = _template_of(files)
        if source is None:
            raise ConfigError(f'{what}: its tokenizer has no chat template; use style = "direct"')
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{what}: its chat template cannot be read ({error})".split("\n")[0]) from None
        self._tokenizer, self._what = tokenizer, what
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        self._named = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }

    def encode(self, messages: Sequence[Mapping[str, str]], reply_start: str = "") -> np.ndarray:
        """Ids [n] int32 of messages ("role", "content") and of the beginning of the reply to them.

        A system's message goes to the head of the user's where the template knows no such role.
        """
        found = self._marked(messages)
        if found is None and messages[0]["role"] == "system":
            system, user, *rest = messages
            merged = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
            messages = [merged, *rest]
            found = self._marked(messages)
        if found is None:
            raise ConfigError(f'{self._what}: its chat template takes no such messages; use style = "direct"')
        special = self._tokenizer.special_tokens
        if not any(name in message["content"] for message in messages for name in special):
            text = self._rendered(messages)
            assert text is not None, "it took the same messages with marks in them"
            return self._tokenizer.encode_with_special(text + reply_start)
        pieces = _PLACES.split(found + reply_start)  # template, number, template, ...
        encoded = [
            self._tokenizer.encode(messages[int(piece)]["content"])
            if n % 2
            else self._tokenizer.encode_with_special(piece)
            for n, piece in enumerate(pieces)
        ]
        return np.concatenate(encoded).astype(np.int32)

    def _marked(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """The rendered text with marks in the place of contents; None where one is lost or refused."""
        marked = [{**message, "content": _PLACE.format(number)} for number, message in enumerate(messages)]
        text = self._rendered(marked)
        return text if text is not None and len(_PLACES.findall(text)) == len(messages) else None

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """The template's text; None where it refuses the messages."""
        import jinja2

        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._named)
        except (jinja2.TemplateError, TypeError, ValueError):
            return None


def _refuse(message: str) -> None:
    raise ValueError(message)


def _template_of(files: Mapping[str, bytes]) -> str | None:
    """The default template, in any of the places where transformers keeps it."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    for name in ("chat_template.json", "tokenizer_config.json"):
        found: Any = json.loads(files.get(name, b"{}")).get("chat_template")
        if isinstance(found, list):
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None
