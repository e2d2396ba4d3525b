"""The rewriter behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from sip_engine.config.judge import ServerConfig
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.llm.client import Chat, ChatClient, Reply, json_schema, request_seed
from sip_engine.rewriters.prompt import read_rewrite, rewrite_prompt
from sip_engine.types import Cost, Failure, RewriteRequest


class ServerRewriter:
    """A `Rewriter` that asks a language model, each suffix in one request (method §rewriter).

    The caller cuts rewrites to the length of a suffix. What the cache knows costs no call and no token.
    """

    name = "server"

    def __init__(
        self, cfg: ServerConfig, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """`sleep` waits before a retry.

        Raises:
            ConfigError: the key's environment variable is not set.
            DataError: the cache cannot be used.
        """
        self._cfg = cfg
        self._client = ChatClient(cfg, "rewriter.server", sleep=sleep)
        self.cost = Cost()
        """Of all rewrites so far."""

    def rewrite(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[str | Failure]:
        """One suffix, or failure, a request, in order; another seed asks for another rewrite.

        Raises:
            EndpointError: the server cannot be used with these settings, found at the first request.
        """
        answers = self._client.ask([self._chat(request, seed) for request in requests])
        self.cost = sum((answer.cost for answer in answers), self.cost)
        return [answer.value if isinstance(answer, Reply) else answer for answer in answers]

    def _chat(self, request: RewriteRequest, seed: int) -> Chat[str]:
        cfg = self._cfg
        prompt = rewrite_prompt(
            request, key=str(cfg.seed), format=cfg.format, max_prefix_chars=cfg.max_prefix_chars
        )
        return Chat(
            messages=prompt.messages(cfg.system_role),
            read=partial(read_rewrite, prompt=prompt),
            seed=request_seed(cfg.seed, seed, prompt.mark),
            response_format=json_schema("rewrite", prompt.schema) if cfg.format == "json_schema" else None,
        )


def open_rewriter(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> ServerRewriter:
    """`rewriter.backend = "server"`."""
    del corpus, mesh
    return ServerRewriter(cfg.rewriter.server)
