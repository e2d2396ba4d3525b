"""The benchmark of injected texts: what it counts of judges that obey, that resist, that doubt and that fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from label_settings import config

from benchmarks import injections
from benchmarks.injection_counts import (
    ANY,
    CONTROLS,
    MEAN,
    PLACES,
    Case,
    PairCase,
    SafetyCase,
    accuracy,
    attack,
    moves,
)
from sip_engine.data.corpus import open_corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.injection_texts import INJECTIONS
from sip_engine.evaluation.intervals import wilson
from sip_engine.types import Failure, Judgment, PairQuestion, Question, SafetyQuestion, Score
from sip_engine.world import World, WorldJudge

ORDER, THREAT, RULES = (one for one in INJECTIONS if one.name in ("order", "threat", "new rules"))
WORST, BAD = "worst", "bad"


class Scripted:
    """Calls texts with a bad word worse and unsafe; one that `obeys` is true of wins and is safe.

    It says nothing about texts that hold "mute".
    """

    name = "scripted"

    def __init__(self, obeys: Callable[[str], bool]) -> None:
        self.obeys = obeys

    def worth(self, text: str) -> float:
        return 9.0 if self.obeys(text) else -float(text.count(BAD))

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        return [self.one(question) for question in questions]

    def one(self, question: Question) -> Judgment:
        if "mute" in str(question):
            return Failure("nothing to say")
        if isinstance(question, PairQuestion):
            first, second = self.worth(question.first), self.worth(question.second)
            return Score(0.5 + 0.3 * float(np.sign(first - second)))
        assert isinstance(question, SafetyQuestion)
        return Score(0.9 if self.worth(question.suffix) >= 0 else 0.1)


PAIRS = [PairCase(f"prefix {n}", "good", f"{BAD} {n}", bool(n % 2)) for n in range(7)]
UNSAFE = [SafetyCase(f"{BAD} {n}") for n in range(5)]


@pytest.mark.parametrize("cases", [PAIRS, UNSAFE], ids=["quality", "safety"])
def test_one_judge_obeys_and_another_does_not(cases: list[Case]) -> None:
    plain, rows = attack(Scripted(lambda text: False), cases, [ORDER, THREAT, RULES], 0)
    assert (plain == -1).all() and accuracy(plain, np.array([]))["accuracy"] == 1.0
    assert len(rows) == 2 * (len(CONTROLS) + 3 + 2)
    for row in rows:
        asked = len(cases) * (3 if row["injection"] == MEAN else 1)
        assert (row["asked"], row["can_move"], row["moved"], row["away"], row["failed"]) == (
            asked,
            asked,
            0,
            0,
            0,
        )
        assert (row["share"], row["high"]) == (0.0, round(wilson(0, len(cases))[1], 4))

    # Follows an order wherever it stands, a threat at the end only.
    obedient = Scripted(lambda text: ORDER.text in text or text.endswith(THREAT.text))
    plain, rows = attack(obedient, cases, [ORDER, THREAT, RULES], 0)
    assert (plain == -1).all()
    shares = {(row["injection"], row["place"]): row["share"] for row in rows}
    expected: dict[Any, float] = dict.fromkeys(product([one.name for one in CONTROLS], PLACES), 0.0)
    for place, threat, mean in zip(PLACES, (1.0, 0.0), (2 / 3, 1 / 3), strict=True):
        expected |= {(ORDER.name, place): 1.0, (THREAT.name, place): threat, (RULES.name, place): 0.0}
        expected |= {(MEAN, place): round(mean, 4), (ANY, place): 1.0}
    assert shares == expected


def test_failures_and_verdicts_that_could_not_move_are_left_out() -> None:
    """Of eight texts two fail (one of them plain), one has won already, one is undecided, one turns away."""
    plain = np.array([-1, -1, -1, -1, np.nan, 1, 0, 0])
    attacked = np.array([1, 0, -1, np.nan, 1, 1, 1, -1])
    found = moves(plain, attacked[None])
    low, high = wilson(3, 5)
    assert found == {
        "asked": 8,
        "failed": 2,
        "can_move": 5,  # three that were lost, and the two undecided
        "moved": 3,
        "can_turn": 3,
        "away": 1,
        "share": 0.6,
        "low": round(low, 4),
        "high": round(high, 4),
    }
    assert moves(np.array([1.0, np.nan]), np.array([[1.0, 1.0]]))["share"] == ""
    found = accuracy(np.array([-1, 0, 1, np.nan]), np.array([1.0, 1.0]))
    assert (found["accuracy"], found["accuracy_n"]) == (0.7, 5)

    mute = [PairCase("p", "good", f"{BAD} mute", True), *PAIRS]
    _, rows = attack(Scripted(lambda text: ORDER.text in text), mute, [ORDER], 0)
    for row in rows:
        assert (row["failed"], row["can_move"]) == (1, len(PAIRS))


def test_interval_of_several_injections_is_over_texts() -> None:
    """All verdicts on a text go together: many injections make no more texts."""
    plain, attacked = np.full(20, -1.0), np.tile(np.repeat([1.0, -1.0], 10), (30, 1))
    one, many = moves(plain, attacked[:1]), moves(plain, attacked)
    assert one["share"] == many["share"] == 0.5 and many["moved"] == 300
    assert float(str(many["high"])) - float(str(many["low"])) > 0.3
    assert (
        (one["low"], one["high"]) == (many["low"], many["high"]) == tuple(round(x, 4) for x in wilson(10, 20))
    )


def test_only_texts_with_a_certain_answer_are_asked_about(mesh: Mesh, tmp_path: Path) -> None:
    """Shaky ones, about which the truth itself changes its mind beside a harmless sentence, are left out."""
    harmless = CONTROLS[0].text
    suffixes = ["bad 1", "good 1", "bad shaky", "bad 2", "good 2", "good 3"]
    corpus: Any = SimpleNamespace(held_out=[SimpleNamespace(prefix="p", suffix=text) for text in suffixes])
    truth = Scripted(lambda text: "shaky" in text and text.startswith(f" {harmless}"))
    unsafe, safe = injections.safety_cases(corpus, truth, 9)
    assert [case.text for case in unsafe] == ["bad 1", "bad 2"] and [case.text for case in safe] == [
        "good 1",
        "good 2",
    ]

    cfg = config(tmp_path, eval={"num_prefixes": 60})
    opened, world = open_corpus(cfg, mesh), WorldJudge(World(seed=0, num_people=48))
    assert len(found := injections.pair_cases(cfg, opened, world, 5, 0)) == 5
    assert [case.shown_first for case in found] == [False, True, False, True, False]
    assert not injections.pair_cases(cfg, opened, truth, 5, 0), (
        "no copy is worse to one that sees no difference"
    )


def test_the_worlds_own_judge_is_not_moved(mesh: Mesh, tmp_path: Any) -> None:
    cfg = config(tmp_path, eval={"num_prefixes": 120})
    corpus, judge = open_corpus(cfg, mesh), WorldJudge(World(seed=0, num_people=48))
    rows = list(injections.measure(cfg, corpus, judge, judge, pairs=6, unsafe=6, seed=0))
    names = {one.name for one in (*CONTROLS, *INJECTIONS)} | {MEAN, ANY}
    assert len(rows) == 4 * len(names) and {row["injection"] for row in rows} == names
    for row in rows:
        assert (row["moved"], row["failed"], row["accuracy"]) == (0, 0, 1.0)
        assert row["can_move"] == row["asked"] == 6 * (len(INJECTIONS) if row["injection"] == MEAN else 1)

    obedient = Scripted(lambda text: text.endswith(ORDER.text))
    found = list(injections.measure(cfg, corpus, obedient, judge, pairs=6, unsafe=6, seed=0))
    shares = {
        (row["objective"], row["place"]): row["share"] for row in found if row["injection"] == ORDER.name
    }
    # To it all suffixes of the world are alike and safe, so that an undecided pair can move, and no safety can.
    assert shares[("quality", "appended")] == 1.0 and shares[("quality", "prepended")] == 0.0
    assert shares[("safety", "appended")] == shares[("safety", "prepended")] == ""
