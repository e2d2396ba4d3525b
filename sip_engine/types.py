"""The nouns of the loop: samples, candidates, questions, judgments, verdicts, choices; who judges and rewrites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np


class Kind(StrEnum):
    """Where a candidate suffix comes from (method §candidates)."""

    ORIGINAL = "original"
    REWRITE = "rewrite"
    ROLLOUT = "rollout"


@dataclass(frozen=True)
class Labels:
    """What is scored of a suffix in place of its own tokens: after its token `positions[i]`, the token `ids[i]`.

    Both [n] int; positions count from the suffix's first token and may occur more than once.
    """

    positions: np.ndarray
    ids: np.ndarray

    @classmethod
    def every(cls, positions: np.ndarray, options: np.ndarray) -> Labels:
        """Each option [n] after each place [m]: m * n labels, place by place."""
        return cls(np.repeat(positions, len(options)), np.tile(options, len(positions)))


@dataclass(frozen=True)
class Sample:
    """One cut of a document. Ids are int32; texts join without a separator: document = prefix + suffix."""

    document: int
    """Number of the document in its token file."""
    cut: int
    """Token offset of the suffix within the document."""
    prefix_ids: np.ndarray
    suffix_ids: np.ndarray
    prefix: str
    suffix: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else a prompt's record says of it, for the one who grades replies; empty for documents."""
    labels: Labels | None = None
    """What training asks about the suffix; None: to write it."""
    source: str = ""
    """Name of the part of a mixture that it is of."""


@dataclass(frozen=True)
class Candidate:
    """One possible suffix for a prefix. `logprobs` (float32, nats, one a token) exist for rollouts only."""

    kind: Kind
    index: int
    """Number of the rollout; 0 for the other kinds."""
    ids: np.ndarray
    text: str
    logprobs: np.ndarray | None = None


class SentenceLabel(StrEnum):
    """What there is to say of one sentence of a suffix, in one letter; the first of these that holds.

    Written in lower case it says the same, and that the sentence insults.
    """

    MALFORMED = "X"
    STRANGER = "O"
    """It names someone the document is not about, or a pronoun in it stands for nobody."""
    REPEATED = "R"
    FALSE = "F"
    UNCERTAIN = "U"
    """Its claim cannot be verified."""
    TRUE = "T"
    NEUTRAL = "N"
    """It claims nothing, or only what the prefix had settled."""

    def letter(self, *, insulting: bool) -> str:
        """How the note is written of a sentence that insults, or does not."""
        return self.value.lower() if insulting else self.value


UNSOUND = (SentenceLabel.MALFORMED, SentenceLabel.STRANGER, SentenceLabel.REPEATED)
"""Notes on sentences that break the coherence."""


@dataclass(frozen=True)
class PairQuestion:
    """Which continuation of `prefix` is better? Answer 1.0: `first`, 0.0: `second`, 0.5: no difference."""

    prefix: str
    first: str
    second: str


@dataclass(frozen=True)
class SafetyQuestion:
    """Is this suffix, alone, safe? Answer 1.0: yes, 0.0: no."""

    suffix: str
    prefix: str = ""
    """What it continues: only for a judge that reads the two together for other questions anyway."""


@dataclass(frozen=True)
class FactualityQuestion:
    """Is `suffix` true given the original? Answer 1.0: no hallucination, 0.5: possible, 0.0: definite."""

    prefix: str
    reference: str
    suffix: str


Question = PairQuestion | SafetyQuestion | FactualityQuestion


@dataclass(frozen=True)
class Cost:
    """What judgments cost: calls to the backend, tokens it read and wrote, seconds of its time."""

    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0
    written: int = 0
    """Those of the tokens that it wrote."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.calls + other.calls,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.written + other.written,
        )


@dataclass(frozen=True)
class Score:
    """An answer in [0, 1] to one question: the mean of its votes."""

    value: float
    votes: tuple[float, ...] = ()
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Failure:
    """No answer could be had. Never turned into a number: what failed is dropped and counted."""

    reason: str
    cost: Cost = field(default_factory=Cost)


Judgment = Score | Failure


@dataclass(frozen=True)
class Verdict:
    """A judged pool: per candidate its scores and total reward; None where no judgment could be had."""

    quality: tuple[float | None, ...]
    """Mean win over the other distinct texts, in [0, 1]; expected where the schedule did not ask about all pairs.
    Equal candidates are judged as one; where all are equal it is 0.5.

    None also for a candidate that a tournament did not need to compare: neither best nor worst.
    """
    safety: tuple[float | None, ...]
    factuality: tuple[float | None, ...]
    rewards: tuple[float | None, ...]
    """Weighted sum of the objectives in force; None if one of them is missing: such a candidate cannot be taken."""
    skipped: tuple[bool, ...]
    """True for a candidate that has no reward only because no comparison of it was asked for; nothing failed."""
    pairs: tuple[tuple[int, int, float | None], ...]
    """(first, second, win of the first) of every comparison, in the order they were asked."""
    failures: tuple[str, ...]
    cost: Cost

    @property
    def num_judgments(self) -> int:
        return self.cost.calls


@dataclass(frozen=True)
class Choice:
    """What one prefix contributes to an update: `chosen`, and for paired objectives `rejected`.

    Both are indices into the pool's candidates.
    """

    sample: Sample
    candidates: tuple[Candidate, ...]
    chosen: int
    rejected: int | None = None
    margin: float = 0.0

    def trained(self) -> tuple[Candidate, ...]:
        """The candidates that enter the loss, chosen first."""
        numbers = (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)
        return tuple(self.candidates[n] for n in numbers)


class Judge(Protocol):
    """Answers questions about text. One call may hold many questions, so that a backend can batch them.

    A judge may have an attribute `deterministic`: True says that another seed never changes an answer, so that
    several votes are of no use (`rewards.ask_votes`). Without it a judge counts as random. Another, `silent_on`,
    names the kinds of questions that it has no answer to.
    """

    name: str

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        """One judgment a question, in order. Never raises for the content of a text."""
        ...


@dataclass(frozen=True)
class RewriteRequest:
    """Ask for a better suffix of `prefix` that keeps what was good in `suffix`."""

    prefix: str
    suffix: str


class Rewriter(Protocol):
    """Writes an improved suffix for each request, or says why it could not."""

    name: str

    def rewrite(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[str | Failure]:
        """One suffix text (joined to the prefix without a separator) or failure a request, in order."""
        ...
