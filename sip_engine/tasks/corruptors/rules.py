"""Worse copies of suffixes: the known losers of a judge's training pairs."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sip_engine.types import Failure, RewriteRequest
from sip_engine.world import World, corrupt

_SENTENCE = re.compile(r"[^.!?]*[.!?]+\s*|[^.!?]+$")


@dataclass(frozen=True)
class Corruption:
    """A worse copy of a suffix."""

    text: str
    """Empty where none could be made."""
    flaw: str
    """What was done to it, in one word."""


class Corruptor(Protocol):
    """Writes a copy of each suffix that is worse as a continuation of its prefix."""

    name: str

    def corrupt(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[Corruption | Failure]:
        """One copy or failure a request, in order."""
        ...


class CountingCorruptor:
    """Another corruptor, and how many copies it was asked for and why some could not be had."""

    def __init__(self, corruptor: Corruptor) -> None:
        self.name = corruptor.name
        self.asked = 0
        self.failures: Counter[str] = Counter()
        """Failures by their reason."""
        self._corruptor = corruptor

    def corrupt(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[Corruption | Failure]:
        """What the other one gives."""
        copies = self._corruptor.corrupt(requests, seed=seed)
        self.asked += len(copies)
        self.failures.update(copy.reason for copy in copies if isinstance(copy, Failure))
        return copies

    def summary(self) -> str:
        """The failures in one line, the commonest reasons first; empty if there are none."""
        if not self.failures:
            return ""
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in self.failures.most_common(3))
        more = f"; {len(self.failures) - 3} other reasons" if len(self.failures) > 3 else ""
        return f"{self.name} corruptor: {self.failures.total():,} of {self.asked:,} copies failed: {reasons}{more}"


def rng_of(request: RewriteRequest, seed: int) -> random.Random:
    """Random numbers that depend on the texts, lone surrogates and all, and on the seed."""
    return random.Random(f"{seed} {request.prefix} {request.suffix}".encode(errors="surrogatepass"))


class WorldCorruptor:
    """By the synthetic world's rules: myths, insults, stutters, shuffles, repetitions, digressions."""

    name = "world"

    def __init__(self, world: World) -> None:
        self.world = world

    def corrupt(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[Corruption | Failure]:
        return [Corruption(*corrupt(self.world, r.prefix, r.suffix, seed)) for r in requests]


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
        for way in rng.sample(sorted(made), len(made)):
            if made[way].split() != request.suffix.split():
                return Corruption(made[way], way)
        return Failure("no rule changes this suffix")


def _shuffle_words(sentence: str, rng: random.Random) -> str:
    words = sentence.split(" ")
    return " ".join(rng.sample(words, len(words)))
