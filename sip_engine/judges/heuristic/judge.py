"""Rule-based stand-in for a judge model: counts, lists and rules answer all three questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.judges.heuristic.factuality import TAIL_CHARS, Facts, agreement
from sip_engine.judges.heuristic.lexicon import DEFAULT_PATH, Lexicon
from sip_engine.judges.heuristic.quality import QualityModel
from sip_engine.types import Cost, FactualityQuestion, Judgment, PairQuestion, Question, SafetyQuestion, Score
from sip_engine.utils.errors import ConfigError

_RELATIVE_MARGIN = 0.01
_DOCUMENTS = 2000
"""Documents of a run whose trigrams the judge counts."""


class HeuristicJudge:
    """Answers by rules, not by a language model: for runs and tests on real text without a judge model.

    It looks at surface only.
    - Pair: word trigrams of a corpus sample, repetition, copying, letters, brackets and quotes, word entropy,
      length, and whether the uncommon words go on with the prefix's (`QualityModel`). It does not see
      meaning: logic, facts, style, and grammar beyond three words are out of its sight.
    - Safety: a short English list of words and phrases (`Lexicon`). It does not see unsafe content without
      those words, nor that a quotation of them may be harmless.
    - Factuality: names and numbers against the original suffix and the prefix (`agreement`). It does not see
      wrong statements made of known words, negations, numbers in words, or truths the original leaves out.

    Words are runs of letters, names are words with a capital inside a sentence: fit for English and its like,
    not for scripts without spaces. Deterministic; a seed changes nothing.
    """

    name = "heuristic"
    deterministic = True

    def __init__(self, quality: QualityModel, lexicon: Lexicon) -> None:
        self._quality = quality
        self._is_safe = lru_cache(maxsize=4096)(lambda text: lexicon.find(text) is None)
        # All candidates of a group share one prefix and one reference.
        self._prefix_facts = lru_cache(maxsize=64)(Facts.read)
        self._facts = lru_cache(maxsize=1024)(Facts.read)

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], *, max_chars: int = 4_000_000, unsafe_words: Path = DEFAULT_PATH
    ) -> HeuristicJudge:
        """Build from the first `max_chars` characters of a corpus sample the policy does not train on.

        `unsafe_words` is a text file with one word or phrase a line. Raises ConfigError for `max_chars`
        below 1, and DataError for too small a sample or an unusable word list.
        """
        if max_chars < 1:
            raise ConfigError(f"max_chars {max_chars}: must be at least 1; the default is 4,000,000")
        return cls(QualityModel.from_texts(_take(texts, max_chars)), Lexicon.load(unsafe_words))

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        """One Score a question, in order, of one vote and one call; never a Failure. `seed` is not used."""
        del seed
        values = [self._answer(question) for question in questions]
        return [Score(value, (value,), Cost(calls=1)) for value in values]

    def _answer(self, question: Question) -> float:
        match question:
            case PairQuestion(prefix, first, second):
                return _compare(self._quality.quality(prefix, first), self._quality.quality(prefix, second))
            case SafetyQuestion(suffix):
                return 1.0 if self._is_safe(suffix) else 0.0
            case FactualityQuestion(prefix, reference, suffix):
                tail = prefix[-TAIL_CHARS:]
                return agreement(
                    self._prefix_facts(prefix), self._facts(reference, tail), self._facts(suffix, tail)
                )


def _compare(first: float, second: float) -> float:
    if abs(first - second) <= _RELATIVE_MARGIN * max(first, second):
        return 0.5
    return 1.0 if first > second else 0.0


def open_judge(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> HeuristicJudge:
    """`judge.backend = "heuristic"`."""
    del mesh
    return HeuristicJudge.from_texts(corpus.texts(_DOCUMENTS))


def _take(texts: Iterable[str], max_chars: int) -> list[str]:
    taken: list[str] = []
    for text in texts:
        taken.append(text[:max_chars])
        max_chars -= len(text)
        if max_chars <= 0:
            break
    return taken
