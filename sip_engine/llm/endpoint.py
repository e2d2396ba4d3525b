"""One request to an OpenAI-compatible server: what was answered, what may pass, and what cannot be healed."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import os
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sip_engine.config.judge import ServerConfig
from sip_engine.llm.completion import Tokens, one_line, read_completion, read_echo, server_words
from sip_engine.types import Failure
from sip_engine.utils.errors import ConfigError

if TYPE_CHECKING:
    import openai

_MAX_BODY_BYTES = 8 << 20
_RETRIED = (408, 409, 429)
OPTIONAL = ("temperature", "top_p", "max_tokens", "seed")
"""Fields of a request that `omit` may leave out."""
_REMEDIES = {
    401: "the key is missing or wrong: correct the environment variable that key_env names",
    403: "the key may not use this model: correct the key or the model",
    404: "there is no such model or path: correct the model, or the url (it ends in /v1 on most servers)",
    405: "this path takes no such requests: correct the url (it ends in /v1 on most servers)",
}


class EndpointError(ConfigError):
    """A server cannot be used with these settings, and asking again will not change that."""


class Transient(Exception):
    """An attempt failed in a way that may pass; `retry_after` is in seconds, where the server named a time."""

    def __init__(self, reason: str, *, retry_after: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.unreachable = unreachable


class Endpoint:
    """A server, and whether it has answered yet.

    No key is sent unless `key_env` names one; what the environment holds for other servers is not used, nor are
    its proxies where the server runs on this machine. Nothing follows a redirection.
    """

    def __init__(self, cfg: ServerConfig, section: str) -> None:
        """`section` names the settings in messages. Raises EndpointError where the key's variable is not set."""
        self.url = cfg.url.rstrip("/")
        self.answered = False
        self._cfg = cfg
        self._section = section
        if cfg.key_env and not os.environ.get(cfg.key_env):
            raise EndpointError(
                f'{section}.key_env = "{cfg.key_env}": that environment variable is not set; export the key in it'
            )

    @asynccontextmanager
    async def session(self) -> AsyncIterator[openai.AsyncOpenAI]:
        """Connections for the requests of one event loop."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        cfg = self._cfg
        transport = DefaultAsyncHttpxClient(
            timeout=cfg.request_s,
            follow_redirects=False,
            trust_env=not is_loopback(self.url),
            # Plain http needs no certificates, and they take long to load.
            verify=self.url.startswith("https:"),
        )
        async with AsyncOpenAI(
            # None would mean: look for another server's in the environment.
            api_key=self._key(),
            admin_api_key="",
            base_url=self.url,
            timeout=cfg.request_s,
            max_retries=0,
            http_client=transport,
        ) as session:
            # Imported on first use, which takes a second: not on a request's time.
            _ = session.chat.completions
            yield session

    async def send(
        self, session: openai.AsyncOpenAI, request: Mapping[str, Any]
    ) -> tuple[str | Failure, Tokens]:
        """Send a request's body once. Returns the reply's text, or a failure that will not pass, and its tokens.

        A body with `messages` is a chat; one with a `prompt` asks for that prompt's log-probs (`read_echo`).

        Raises:
            Transient: it may work later.
            EndpointError: the server never answered, and will not with these settings.
        """
        import anyio
        import httpx2
        import openai

        body, read = dict(request), partial(read_completion, max_tokens=request.get("max_tokens"))
        required = {name: body.pop(name) for name in ("model", "messages", "prompt") if name in body}
        create: Any = session.chat.completions.with_streaming_response.create
        if "prompt" in required:
            create, read = session.completions.with_streaming_response.create, read_echo
        unsent = ("OpenAI-Organization", "OpenAI-Project", *(() if self._key() else ("Authorization",)))
        try:
            async with asyncio.timeout(self._cfg.request_s):
                async with create(
                    **required,
                    extra_body=body,
                    extra_headers={name: openai.Omit() for name in unsent},
                ) as response:
                    data = await _read_body(response)
            self.answered = True
            found, tokens = read(data)
            return (Failure(self.hide_key(found.reason)) if isinstance(found, Failure) else found), tokens
        except (TimeoutError, openai.APITimeoutError, httpx2.TimeoutException):
            raise Transient(f"no reply within {self._cfg.request_s:g} s") from None
        except openai.APIStatusError as error:
            return self._refused(error, request), Tokens()
        except (openai.APIConnectionError, httpx2.HTTPError, anyio.EndOfStream, OSError) as error:
            cause = error.__cause__ or error
            reason = one_line(self.hide_key(f"{type(cause).__name__}: {cause}"))
            raise Transient(f"no connection ({reason})", unreachable=True) from None

    def _refused(self, error: openai.APIStatusError, request: Mapping[str, Any]) -> Failure:
        status, words = error.status_code, self.hide_key(_words_of(error))
        reason = f"HTTP {status}: {words}" if words else f"HTTP {status}"
        named = [name for name in OPTIONAL if name in request and re.search(rf"\b{name}\b", words)]
        if status in (400, 422) and named:
            reason += f" ({self._section}.omit = {named} leaves it out)"
        if status in _RETRIED or status >= 500:
            raise Transient(reason, retry_after=_retry_after(error.response.headers)) from None
        if not self.answered and (status in _REMEDIES or status < 400):
            remedy = _REMEDIES.get(status, "the url has moved: set the one it points to")
            raise EndpointError(f"{self._section}: {self.url} answers {reason}; {remedy}") from None
        return Failure(reason)

    def _key(self) -> str:
        return os.environ.get(self._cfg.key_env, "") if self._cfg.key_env else ""

    def hide_key(self, text: str) -> str:
        """A text without the key, whoever repeats it."""
        key = self._key()
        return text.replace(key, "***") if key else text


def _words_of(error: openai.APIStatusError) -> str:
    """What the server said with its error, on one line."""
    try:
        return server_words(error.response.content)
    except Exception:  # the body was cut off, or never read
        return one_line(error.message)


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _read_body(response: Any) -> bytes:
    """The response's bytes; reading stops beyond what any honest reply holds."""
    data = bytearray()
    async for chunk in response.iter_bytes():
        data += chunk
        if len(data) > _MAX_BODY_BYTES:
            break
    return bytes(data)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from a number of seconds or a date; None where there is none that makes sense."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
