"""What a corruptor is: someone who writes worse copies of suffixes, the known losers of a judge's training pairs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sip_engine.llm.completion import SAID
from sip_engine.types import Failure, RewriteRequest


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
        """Failures by their reason, whatever the server said with them."""
        self._said: dict[str, str] = {}
        self._corruptor = corruptor

    def corrupt(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[Corruption | Failure]:
        """What the other one gives."""
        copies = self._corruptor.corrupt(requests, seed=seed)
        self.asked += len(copies)
        for copy in copies:
            if isinstance(copy, Failure):
                reason, mark, words = copy.reason.partition(SAID)
                self.failures[reason] += 1
                self._said.setdefault(reason, mark + words)
        return copies

    def summary(self) -> str:
        """The failures in one line, the commonest reasons first; empty if there are none."""
        if not self.failures:
            return ""
        commonest = self.failures.most_common(3)
        reasons = "; ".join(f"{reason} ({count:,}){self._said[reason]}" for reason, count in commonest)
        more = f"; {len(self.failures) - 3} other reasons" if len(self.failures) > 3 else ""
        return f"{self.name} corruptor: {self.failures.total():,} of {self.asked:,} copies failed: {reasons}{more}"


def rng_of(request: RewriteRequest, seed: int) -> random.Random:
    """Random numbers that depend on the texts, lone surrogates and all, and on the seed."""
    return random.Random(f"{seed} {request.prefix} {request.suffix}".encode(errors="surrogatepass"))


def one_way(made: Mapping[str, str], request: RewriteRequest, rng: random.Random) -> Corruption | Failure:
    """Of the copies made in several ways, in an order that is drawn, the first that changes the suffix's words.

    made: Way -> copy.
    """
    for way in rng.sample(sorted(made), len(made)):
        if made[way].strip() and made[way].split() != request.suffix.split():
            return Corruption(made[way], way)
    return Failure("nothing that this corruptor does changes this suffix")
