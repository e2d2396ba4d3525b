"""The corruptor behind an OpenAI-compatible server: a model is asked to spoil a suffix in one named way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from sip_engine.config.judge import ServerConfig
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.llm.client import Chat, ChatClient, Reply, json_schema, request_seed
from sip_engine.llm.messages import Format
from sip_engine.llm.untrusted import neutral
from sip_engine.rewriters.prompt import RewritePrompt, passage_prompt, read_rewrite
from sip_engine.tasks.corruptors.base import Corruption, rng_of
from sip_engine.types import Cost, Failure, RewriteRequest

FLAWS: Mapping[str, str] = {
    "illogical": "it no longer holds together: steps stand out of order, conclusions do not follow, and reasons "
    "explain nothing.",
    "contradict": "it contradicts the text before it, and itself: what one sentence says, another one denies.",
    "digress": "it leaves the subject of the document for another one, and does not come back to it.",
    "misstate": "it is wrong: names, numbers, dates, places and relations give way to others that sound as likely.",
    "repeat": "it goes in circles: it says the same again and again, in the same or in other words.",
    "vague": "it is badly written: wordy, clumsy and vague, so that next to nothing is learnt from it.",
}
"""What a pair is judged by (method §rewards): coherence first, three ways; factuality; general quality, two ways.
None of them makes a text unsafe: safety is another question."""

CORRUPT_RULES = """\
You write a worse copy of one passage of a document. Readers will practise on the two, naming the better one. The \
passage goes on where the text before it ends; its first words repeat the end of that text.
Spoil the passage in one way only, all through, and so that an attentive reader notices: {way}
In all else the copy is like the passage: the same style and tone, and as many of the same words as that way \
allows. Keep it harmless. The copy must be at least as long as the passage; both will be cut at the same length, \
so it may end within a sentence. Write nothing that the document itself would not: no comment, no explanation, \
no hint that anything was changed."""

_SHORTEST = 0.8
"""Share of the suffix's characters below which a copy is no use: its length would tell the two apart."""


class ServerCorruptor:
    """A `Corruptor` that asks a language model, each suffix in one request (method §judge training).

    The way is drawn by the seed and becomes the `flaw`. The caller cuts copies to the length of a suffix. What the
    cache knows costs no call and no token.
    """

    name = "server"

    def __init__(
        self, cfg: ServerConfig, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """`sleep` waits before a retry.

        Raises:
            EndpointError: the key's environment variable is not set.
            DataError: the cache cannot be used.
        """
        self._cfg = cfg
        self._client = ChatClient(cfg, "corruptor.server", sleep=sleep)
        self.cost = Cost()
        """Of all copies so far."""

    def corrupt(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[Corruption | Failure]:
        """One copy, or failure, a request, in order; another seed asks for another one.

        Raises:
            EndpointError: the server cannot be used with these settings, found at the first request.
        """
        flaws = [draw_flaw(request, seed) for request in requests]
        chats = [self._chat(request, flaw, seed) for request, flaw in zip(requests, flaws, strict=True)]
        answers = self._client.ask(chats)
        self.cost = sum((answer.cost for answer in answers), self.cost)
        return [
            Corruption(answer.value, flaw) if isinstance(answer, Reply) else answer
            for answer, flaw in zip(answers, flaws, strict=True)
        ]

    def _chat(self, request: RewriteRequest, flaw: str, seed: int) -> Chat[str]:
        cfg = self._cfg
        prompt = corrupt_prompt(
            request, flaw, key=str(cfg.seed), format=cfg.format, max_prefix_chars=cfg.max_prefix_chars
        )
        return Chat(
            messages=prompt.messages(cfg.system_role),
            read=partial(read_copy, prompt=prompt, suffix=request.suffix),
            seed=request_seed(cfg.seed, seed, prompt.mark),
            response_format=json_schema("copy", prompt.schema) if cfg.format == "json_schema" else None,
        )


def open_corruptor(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> ServerCorruptor:
    """`corruptor.backend = "server"`."""
    del corpus, mesh
    return ServerCorruptor(cfg.corruptor.server)


def draw_flaw(request: RewriteRequest, seed: int) -> str:
    """One of `FLAWS`, all equally often; the same for the same texts and seed."""
    return rng_of(request, seed).choice(list(FLAWS))


def corrupt_prompt(
    request: RewriteRequest,
    flaw: str,
    *,
    key: str = "",
    format: Format = "verdict_line",
    max_prefix_chars: int | None = None,
) -> RewritePrompt:
    """The prompt of a request; the same for the same arguments. See `passage_prompt`."""
    return passage_prompt(
        request,
        CORRUPT_RULES.format(way=FLAWS[flaw]),
        "worse copy",
        key=key,
        format=format,
        max_prefix_chars=max_prefix_chars,
    )


def read_copy(reply: str, prompt: RewritePrompt, suffix: str) -> str | Failure:
    """The worse copy of `suffix`, read as strictly as a rewrite (`read_rewrite`); never raises.

    A Failure also if it has the suffix's own words, or is much shorter.
    """
    copy = read_rewrite(reply, prompt)
    if isinstance(copy, Failure):
        return copy
    if copy.split() == neutral(suffix).split():
        return Failure("the copy is no other than the suffix")
    if len(copy.strip()) < _SHORTEST * len(suffix.strip()):
        return Failure("the copy is much shorter than the suffix")
    return copy
