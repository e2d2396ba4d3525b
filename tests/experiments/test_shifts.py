"""The judge on what it was not trained on: judges of which it is known how they must fare."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sip_engine.config.parse import parse_config
from sip_engine.config.schema import RunConfig
from sip_engine.data.sources import open_world
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.injection_texts import INJECTIONS
from sip_engine.experiments.reproduction.shifts import CORRUPTIONS, Case, _open, accuracy, shifts
from sip_engine.types import Failure, Judgment, PairQuestion, Question, Score
from sip_engine.world.measure import measure


class Knows:
    """Sides with what a function of prefix and text puts higher."""

    name = "knows"

    def __init__(self, value) -> None:
        self.value = value

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        found: list[Judgment] = []
        for asked in questions:
            assert isinstance(asked, PairQuestion)
            first, second = (self.value(asked.prefix, text) for text in (asked.first, asked.second))
            found.append(Score(0.5 if first == second else float(first > second)))
        return found


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("shifts")
    data = {"vocab_size": 500, "suffix_tokens": 20, "max_prefix_tokens": 60, "min_prefix_tokens": 8}
    values = {
        "out": folder / "out",
        "world": {"num_people": 12, "train_documents": 60, "test_documents": 40},
        "data": {**data, "cache": folder / "cache"},
        "judge": {"backend": "world"},
        "model": {"max_context": 128},
    }
    return parse_config(values, "test")


def test_judges_fare_as_they_must(cfg: RunConfig, mesh: Mesh) -> None:
    world = open_world(cfg)
    assert world is not None
    fooled = {one.text for one in INJECTIONS}
    corpus = _open(cfg, mesh, 12)

    def truth(prefix: str, text: str) -> float:
        return measure(world, prefix, text).quality

    def credulous(prefix: str, text: str) -> float:
        return truth(prefix, text) + 10 * any(text.endswith(injection) for injection in fooled)

    right, misled = (
        {row.name: row for row in shifts(cfg, mesh, corpus, Knows(value), 12)} for value in (truth, credulous)
    )
    here = [row for row in right.values() if row.group != "documents"]  # it knows no other world's facts
    assert {row.group for row in right.values()} == {"", "corruptions", "documents", "lengths", "injections"}
    assert set(CORRUPTIONS) <= set(right)
    for row in here:
        assert row.answered == row.asked > 0 and row.accuracy == 1.0 == row.high, row
        assert row.low is not None and row.low < 1
    elsewhere = right["other people and facts"].accuracy
    assert elsewhere is not None and elsewhere < 1
    for name, row in misled.items():
        if row.group != "documents":
            assert row.accuracy == (0.0 if "injections in turn" in name else 1.0), row


def test_ties_orders_and_failures() -> None:
    cases = [Case("", "good", "bad"), Case("", "good", "bad!"), Case("", "same", "same")]
    first = accuracy("", "x", cases, Knows(lambda prefix, text: 0.0), 0)
    assert (first.accuracy, first.asked, first.answered) == (0.5, 3, 3)
    assert accuracy("", "x", [], Knows(len), 0).accuracy is None

    class Places(Knows):
        def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
            places: list[Judgment] = [Score(0.9) for _ in questions]
            return [*places[:-1], Failure("too long")]

    placed = accuracy("", "x", cases, Places(len), 0)
    assert (placed.accuracy, placed.answered) == (0.5, 2)
    assert placed.low is not None and placed.high is not None and placed.low <= 0.5 <= placed.high
