"""The corruptor for any text: words and sentences are moved, doubled or replaced by rules, without a model."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.tasks.corruptors.base import Corruption, one_way, rng_of
from sip_engine.types import Failure, RewriteRequest

_SENTENCE = re.compile(r"[^.!?]*[.!?]+\s*|[^.!?]+$")


class RuleCorruptor:
    """For any text, by rules: words shuffled within sentences, words doubled, sentences out of order, a sentence
    said again, or another document's suffix in its place. One way a suffix, drawn by the seed."""

    name = "rules"

    def corrupt(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[Corruption | Failure]:
        return [self._one(number, requests, seed) for number in range(len(requests))]

    def _one(self, number: int, requests: Sequence[RewriteRequest], seed: int) -> Corruption | Failure:
        request = requests[number]
        rng = rng_of(request, seed)
        sentences = _SENTENCE.findall(request.suffix)
        other = (
            requests[(number + rng.randrange(1, len(requests))) % len(requests)]
            if len(requests) > 1
            else request
        )
        made = {
            "shuffle": "".join(_shuffle_words(sentence, rng) for sentence in sentences),
            "stutter": re.sub(
                r"\w+", lambda m: f"{m[0]} {m[0]}" if rng.random() < 0.3 else m[0], request.suffix
            ),
            "disorder": "".join(rng.sample(sentences, len(sentences))),
            "repeat": "".join(sentence * 2 for sentence in sentences),
            "digress": other.suffix,
        }
        return one_way(made, request, rng)


def _shuffle_words(sentence: str, rng: random.Random) -> str:
    words = sentence.split(" ")
    return " ".join(rng.sample(words, len(words)))


def open_corruptor(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> RuleCorruptor:
    """`corruptor.backend = "rules"`."""
    del cfg, corpus, mesh
    return RuleCorruptor()
