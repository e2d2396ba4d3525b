"""A rewriter inside the engine: a causal language model that is asked for the whole suffix."""

from __future__ import annotations

from collections.abc import Sequence

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.llm.compact_prompts import rewrite_prompt
from sip_engine.llm.local_model import LocalModel, open_local_model
from sip_engine.rewriters.distributed import StagesRewriter
from sip_engine.types import Failure, RewriteRequest


class LocalRewriter:
    """Rewrites by a causal LM; a reply that does not end, or that is empty, is a failure."""

    name = "local"

    def __init__(self, model: LocalModel) -> None:
        self._model = model

    def rewrite(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[str | Failure]:
        """One text or failure a request, in order; every process that holds the model asks the same."""
        prompts = [
            self._model.encode(rewrite_prompt(one), self._model.cfg.max_new_tokens) for one in requests
        ]
        replies = iter(self._model.reply([ids for ids in prompts if ids is not None], seed))
        texts: list[str | Failure] = []
        for ids in prompts:
            if ids is None:
                texts.append(Failure("the prompt is longer than the rewriter's context"))
                continue
            text, _ = next(replies)
            texts.append(
                text if text else Failure("the rewrite did not end" if text is None else "it is empty")
            )
        return texts


def open_rewriter(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> StagesRewriter:
    """`rewriter.backend = "local"`: every pipeline stage holds the model whole."""
    del corpus
    return StagesRewriter(LocalRewriter(open_local_model(cfg.rewriter.local, mesh, "rewriter")), mesh)
