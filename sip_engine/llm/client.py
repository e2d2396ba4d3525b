"""Many requests to an OpenAI-compatible server at once: retries, deadlines, cache, costs."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sip_engine.config.judge import ServerConfig
from sip_engine.llm.completion import SAID, Tokens, one_line
from sip_engine.llm.endpoint import Endpoint, EndpointError, Transient
from sip_engine.llm.reply_cache import ReplyCache, request_key
from sip_engine.types import Cost, Failure
from sip_engine.utils import heartbeat
from sip_engine.utils.errors import DataError, Stopped
from sip_engine.utils.progress import console
from sip_engine.utils.stopping import Stoppable, stop_requested, stops

if TYPE_CHECKING:
    import openai
    import tenacity

T = TypeVar("T")

_LONGEST_PAUSE_S = 300.0
"""A server that asks for a longer one has refused the request."""


@dataclass(frozen=True)
class Chat(Generic[T]):
    """One request: messages, how to read the reply, and the seed that tells it from its repetitions."""

    messages: Sequence[Mapping[str, str]]
    read: Callable[[str], T | Failure]
    seed: int = 0
    response_format: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Echo(Generic[T]):
    """One request for a prompt's own log-probs, and how to read what `completion.read_echo` makes of them."""

    prompt: str
    read: Callable[[str], T | Failure]
    seed: int = 0


@dataclass(frozen=True)
class Reply(Generic[T]):
    """A reply as `Chat.read` understood it. A reply from the cache, or to an equal request, cost nothing."""

    value: T
    cost: Cost


@dataclass
class _Pending(Generic[T]):
    """A request on its way, and what it has cost so far."""

    key: str
    body: dict[str, Any]
    read: Callable[[str], T | Failure]
    cost: Cost = field(default_factory=Cost)


class ChatClient(Stoppable):
    """Asks one server, synchronously, in batches; holds no connection, thread or file between two batches.

    - At most `concurrency` requests at once; a request that waits to be retried keeps its place, so that an
      overloaded server gets less to do.
    - Retried, with exponential backoff and jitter or after the server's Retry-After: failed connections, no reply
      within `request_s`, and status 408, 409, 429 and 5xx.
    - A server that has answered before and cannot be reached now is waited for until `batch_s` is over, with a line.
    - Until a server has answered once, a batch's first request goes alone, and 401, 403, 404, 405, a redirection
      or an unreachable server raise EndpointError. All other failures are those of one request.
    """

    def __init__(
        self, cfg: ServerConfig, section: str, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """`section` names the settings in messages; `sleep` waits before a retry.

        Raises:
            EndpointError: the key's environment variable is not set.
            DataError: the cache cannot be used.
        """
        self._cfg = cfg
        self._section = section
        self._sleep = sleep
        self._endpoint = Endpoint(cfg, section)
        self._cache = cfg.cache
        if self._cache is not None:
            ReplyCache(self._cache).close()
        self._lock = threading.Lock()
        self._stopped = False
        self._gone = False
        """A server that had answered cannot be reached now, and that was said."""
        self._batch: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        stops(self)

    def ask(self, chats: Sequence[Chat[T] | Echo[T]]) -> list[Reply[T] | Failure]:
        """One answer or failure a request, in order; equal requests are sent once.

        Raises:
            EndpointError: the server cannot be used; see the class.
            Stopped: a signal asked the run to end.
            asyncio.CancelledError: `stop` was called.
        """
        queue: dict[str, _Pending[T]] = {}
        keys = []
        for chat in chats:
            body = self._body(chat)
            key = request_key(self._endpoint.url, body, chat.seed)
            keys.append(key)
            queue.setdefault(key, _Pending(key, body, chat.read))
        with self._open_cache() as cache:
            known = {key: found for key, one in queue.items() if (found := _kept(cache, one)) is not None}
            asked = [one for key, one in queue.items() if key not in known]
            results: dict[str, Reply[T] | Failure] = {**known}
            if asked:
                self._run(self._ask_all(asked, cache, results))
        if cache is not None and cache.failed:
            self._cache = None
        answers, seen = [], set()
        for key in keys:
            answers.append(replace(results[key], cost=Cost()) if key in seen else results[key])
            seen.add(key)
        return answers

    def stop(self) -> None:
        """From any thread, returns at once: cut the batch short; waiting out `batch_s` would keep a dead run alive.

        Nothing more is sent, now or later; replies that have come are in the cache.
        """
        with self._lock:
            self._stopped = True
            if self._batch is not None:
                loop, task = self._batch
                loop.call_soon_threadsafe(task.cancel)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            with heartbeat.waiting():  # no longer than batch_s
                _run(self._stoppable(work))
        except asyncio.CancelledError:
            signum = stop_requested()
            if signum is None:
                raise
            raise Stopped(signum) from None

    async def _stoppable(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        with self._lock:
            if self._stopped:
                work.close()
                raise asyncio.CancelledError("the client was stopped")
            self._batch = asyncio.get_running_loop(), task
        try:
            await work
        finally:
            with self._lock:  # the loop closes after this, and takes no calls then
                self._batch = None

    def _open_cache(self) -> ReplyCache | nullcontext[None]:
        if self._cache is None:
            return nullcontext()
        try:
            return ReplyCache(self._cache)
        except DataError as error:  # it worked when the run began
            console.print(f"{error}; going on without it", soft_wrap=True, markup=False)
            self._cache = None
            return nullcontext()

    def _body(self, chat: Chat[Any] | Echo[Any]) -> dict[str, Any]:
        cfg = self._cfg
        if isinstance(chat, Echo):
            # One token is asked for: some servers take 0 for "without end".
            wanted = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
            wanted = {name: value for name, value in wanted.items() if name not in cfg.omit}
            return {"model": cfg.model, "prompt": chat.prompt, **wanted} | cfg.extra_body
        body: dict[str, Any] = {
            "model": cfg.model,
            "messages": list(chat.messages),
            "temperature": cfg.temperature,
            "top_p": cfg.top_p,
            "max_tokens": cfg.max_tokens,
            "seed": chat.seed,
        }
        body = {name: value for name, value in body.items() if name not in cfg.omit}
        if chat.response_format is not None:
            body["response_format"] = chat.response_format
        return body | cfg.extra_body

    async def _ask_all(
        self, asked: list[_Pending[T]], cache: ReplyCache | None, results: dict[str, Reply[T] | Failure]
    ) -> None:
        """Fill `results`; after `batch_s` seconds what is still missing becomes a failure."""
        slots = asyncio.Semaphore(self._cfg.concurrency)

        async def one(pending: _Pending[T]) -> None:
            async with slots:
                results[pending.key] = await self._ask_one(session, pending, cache, end)

        async with self._endpoint.session() as session:
            end = asyncio.get_running_loop().time() + self._cfg.batch_s
            scouts = 0 if self._endpoint.answered else 1
            for group in (asked[:scouts], asked[scouts:]):
                await self._within(end, {asyncio.create_task(one(each)): each for each in group}, results)

    async def _within(
        self,
        end: float,
        tasks: dict[asyncio.Task[None], _Pending[T]],
        results: dict[str, Reply[T] | Failure],
    ) -> None:
        if not tasks:
            return
        try:
            left = max(0.0, end - asyncio.get_running_loop().time())
            done, late = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        reason = f"no answer before the batch's deadline of {self._cfg.batch_s:g} s"
        for task in late:
            results.setdefault(tasks[task].key, Failure(reason, tasks[task].cost))

    async def _ask_one(
        self, session: openai.AsyncOpenAI, pending: _Pending[T], cache: ReplyCache | None, end: float
    ) -> Reply[T] | Failure:
        import tenacity

        loop = asyncio.get_running_loop()

        def enough(state: tenacity.RetryCallState) -> bool:
            pause = state.upcoming_sleep
            late = loop.time() + pause >= end or pause > max(_LONGEST_PAUSE_S, self._cfg.max_backoff_s)
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, Transient) and error.unreachable and self._endpoint.answered:
                self._say_gone(error, end - loop.time())
                return late
            return late or state.attempt_number > self._cfg.max_retries

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Transient),
            wait=self._wait,
            stop=enough,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            reply = await retrying(self._attempt, session, pending)
        except Transient as error:
            if error.unreachable and not self._endpoint.answered:
                raise EndpointError(
                    f"{self._section}: no server answers at {self._endpoint.url} ({error}); start it, or "
                    "correct the url"
                ) from None
            return Failure(str(error), pending.cost)
        if isinstance(reply, Failure):
            return Failure(reply.reason, pending.cost)
        value = pending.read(reply)
        if isinstance(value, Failure):
            said = self._endpoint.hide_key(f"{value.reason}{SAID}{one_line(reply)}")
            return Failure(said, pending.cost)
        if cache is not None:
            cache.put(pending.key, reply)
        return Reply(value, pending.cost)

    async def _attempt(self, session: openai.AsyncOpenAI, pending: _Pending[Any]) -> str | Failure:
        started, spent = time.monotonic(), Tokens()
        try:
            reply, spent = await self._endpoint.send(session, pending.body)
            if self._gone:
                self._gone = False
                console.print(
                    f"{self._section}: {self._endpoint.url} answers again", soft_wrap=True, markup=False
                )
            return reply
        finally:  # an attempt that fails, or is cut short, has cost a call and its time too
            pending.cost += Cost(1, sum(spent), time.monotonic() - started, spent.written)

    def _say_gone(self, error: Transient, left: float) -> None:
        if not self._gone:
            self._gone = True
            console.print(
                f"{self._section}: {self._endpoint.url} has answered before, now there is {error}; waiting for it, "
                f"up to {max(left, 0):.0f} s (batch_s)",
                soft_wrap=True,
                markup=False,
            )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next attempt: what the server asked for, else exponential; jitter on both."""
        import tenacity

        first = self._cfg.backoff_s
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, Transient) and error.retry_after is not None:
            return error.retry_after + tenacity.wait_random(0, first)(state)
        return tenacity.wait_exponential_jitter(first, self._cfg.max_backoff_s, jitter=first)(state)


def json_schema(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The response format that holds a server to a schema."""
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}


def _kept(cache: ReplyCache | None, pending: _Pending[T]) -> Reply[T] | None:
    """The answer in the cache, if there is one and it is still understood."""
    reply = cache.get(pending.key) if cache is not None else None
    value = Failure("not kept") if reply is None else pending.read(reply)
    return None if isinstance(value, Failure) else Reply(value, Cost())


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run on a new event loop; on another thread where this one has a loop running (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


def request_seed(*parts: int | str) -> int:
    """A seed that every server takes, in [0, 2³¹), from all of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1
