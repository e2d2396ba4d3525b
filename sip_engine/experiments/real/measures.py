"""What a policy's greedy continuations are worth: by the judge that trained it, and by measures that did not.

Figures, each over held-out prefixes (`evaluation.intervals`: sums of totals and weights, one row a prefix):

- win_rate: against the base's continuations, by the judge in training (mutual information of the frozen real model);
- factuality: another objective of the same model, never trained on: what the original adds to the continuation;
- rules_win_rate: against the base's continuations, by the heuristic judge, which is no model;
- similarity: cosine of the sentence embeddings of the continuation and of the true suffix;
- repetition: share of a continuation's word 3-grams that it has said before (lower is better);
- heldout_loss: next-token loss on the true suffix, nats a token (lower is better).

`distinct_3`, the share of distinct token 3-grams in all continuations together, has no rows and no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus, open_corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.held_out import evaluate
from sip_engine.judges.heuristic.judge import HeuristicJudge
from sip_engine.judges.open import open_judge
from sip_engine.policy.checkpoint import checkpoint_tokenizer, resolve_checkpoint
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.types import Failure, PairQuestion, Sample

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts -> [texts, channels] float32 of length 1."""
HIGHER_IS_BETTER = {
    "win_rate": True,
    "factuality": True,
    "rules_win_rate": True,
    "similarity": True,
    "repetition": False,
    "distinct_3": True,
    "heldout_loss": False,
}
"""Figure -> its direction, in the order of the tables; the first is the judge's own."""
_FROM_EVALUATION = ("win_rate", "factuality", "heldout_loss")
_PACKAGE_TEXTS = 2000
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Measured:
    """One policy's continuations and figures."""

    continuations: list[str]
    table: dict[str, np.ndarray]
    """Figure -> [prefixes, 2] float64 totals and weights."""
    distinct_3: float


class Examiner:
    """Examines policies that share documents and tokenizer; judge, rules and embeddings are loaded once."""

    def __init__(self, cfg: RunConfig, base: Path, num_prefixes: int, embed: Embed, mesh: Mesh) -> None:
        evaluated = cfg.eval.model_copy(update={"num_prefixes": num_prefixes})
        self._cfg, self._mesh, self._embed = cfg.model_copy(update={"eval": evaluated}), mesh, embed
        self.corpus: Corpus = open_corpus(self._cfg, mesh, checkpoint_tokenizer(resolve_checkpoint(base)))
        self._judge = open_judge(self._cfg, self.corpus, mesh)
        self._rules = HeuristicJudge.from_texts(self.corpus.texts(_PACKAGE_TEXTS))
        self._originals = embed([one.suffix for one in self.samples])

    @property
    def samples(self) -> list[Sample]:
        """The held-out prefixes with their true suffixes."""
        return self.corpus.held_out

    def examine(self, checkpoint: Path, rivals: Sequence[str] | None) -> Measured:
        """A checkpoint's figures; `rivals` are the base's continuations, None for the base itself."""
        policy, _ = FrozenPolicy.load(resolve_checkpoint(checkpoint), self._mesh)
        policy.micro_batch_tokens = _BATCH_TOKENS  # memory of a laptop
        found = evaluate(
            policy,
            policy.sampler(self._cfg.sampler),
            self.samples,
            policy.tokenizer,
            self._judge,
            self._cfg.judge,
            rivals,
        )
        texts = found.continuations
        table = {name: found.table[name] for name in _FROM_EVALUATION if name in found.table}
        table |= {
            "rules_win_rate": self._rules_wins(texts, texts if rivals is None else rivals),
            "similarity": _column((self._embed(texts) * self._originals).sum(axis=1)),
            "repetition": np.array([repeated_trigrams(text) for text in texts], np.float64),
        }
        return Measured(texts, table, found.figures["distinct_3"])

    def _rules_wins(self, texts: Sequence[str], rivals: Sequence[str]) -> np.ndarray:
        """[prefixes, 2]: the heuristic judge's comparisons, in both orders."""
        there = [PairQuestion(s.prefix, a, b) for s, a, b in zip(self.samples, texts, rivals, strict=True)]
        back = [PairQuestion(s.prefix, b, a) for s, a, b in zip(self.samples, texts, rivals, strict=True)]
        answers = self._rules.judge([*there, *back])
        values = [float("nan") if isinstance(one, Failure) else one.value for one in answers]
        first, second = np.array(values[: len(there)]), np.array(values[len(there) :])
        return _column((first + 1.0 - second) / 2)


def repeated_trigrams(text: str) -> tuple[float, float]:
    """Word 3-grams of a text that it has said before, and all of them."""
    words = text.lower().split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return float(len(grams) - len(set(grams))), float(len(grams))


def sentence_embedder(folder: Path) -> Embed:
    """A sentence-embedding model of transformers, as sentence-transformers runs it: mean over tokens, length 1.

    folder: config.json, weights and tokenizer of a BERT-like encoder.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = []
        for text in texts:  # one by one: nothing to pad, and nothing depends on the others
            ids = tokenizer(text or " ", truncation=True, max_length=256, return_tensors="pt")
            hidden = model(**ids).last_hidden_state[0]  # [tokens, channels]
            rows.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0))
        return torch.stack(rows).float().numpy()

    return embed


def _column(values: np.ndarray) -> np.ndarray:
    """[n, 2] of one value a prefix, without weight where it is missing."""
    known = np.isfinite(values)
    return np.stack([np.where(known, values, 0.0), known.astype(np.float64)], axis=1)
