"""The judge of the synthetic world: it answers by rule what a trained judge would answer by reading."""

from __future__ import annotations

from collections.abc import Sequence

from sip_engine.errors import ConfigError
from sip_engine.types import Cost, FactualityQuestion, Judgment, PairQuestion, Question, Score
from sip_engine.world.facts import World, rng_of
from sip_engine.world.measure import is_safe, measure


class WorldJudge:
    """A `Judge` that knows the truth.

    Pairs go to the higher quality (0.5 only where the two are equal), safety looks at the suffix alone,
    factuality needs no reference. With `accuracy` below 1 a verdict is turned round with probability
    1 - accuracy, decided by the question and the seed alone.
    """

    name = "world"

    def __init__(self, world: World, accuracy: float = 1.0) -> None:
        """Raises ConfigError for an accuracy outside [0.5, 1]."""
        if not 0.5 <= accuracy <= 1.0:
            raise ConfigError(f"accuracy = {accuracy}: must lie in 0.5..1; 0.5 is a judge that guesses")
        self.world = world
        self.accuracy = accuracy

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        """One score a question, in order; a call and a vote each."""
        values = (self._answer(question, seed) for question in questions)
        return [Score(value, (value,), Cost(calls=1)) for value in values]

    def _answer(self, question: Question, seed: int) -> float:
        value = self._verdict(question)
        if self.accuracy < 1.0 and rng_of("verdict", seed, repr(question)).random() >= self.accuracy:
            return 1.0 - value
        return value

    def _verdict(self, question: Question) -> float:
        if isinstance(question, PairQuestion):
            first = measure(self.world, question.prefix, question.first).quality
            second = measure(self.world, question.prefix, question.second).quality
            return 0.5 if first == second else float(first > second)
        if isinstance(question, FactualityQuestion):
            return measure(self.world, question.prefix, question.suffix).factuality
        return float(is_safe(question.suffix))
