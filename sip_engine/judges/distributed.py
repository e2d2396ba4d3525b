"""Asks a judge once a model replica and gives every process of it all answers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from sip_engine.distributed.mesh import Mesh
from sip_engine.distributed.sharing import on_leader, on_stages, share_out
from sip_engine.types import Judge, Judgment, Question


class ReplicaJudge:
    """A judge that the first process of a replica asks; `judge` is called by all of them."""

    def __init__(self, judge: Judge, mesh: Mesh) -> None:
        self.name = judge.name
        self.deterministic = getattr(judge, "deterministic", False)
        self.silent_on = getattr(judge, "silent_on", ())
        self.asked = judge
        """The judge itself, which the first process of a replica may also ask by itself."""
        self._mesh = mesh

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        """`Judge.judge`, the same on every process of the replica, and so is a SipError of it."""
        return on_leader(self._mesh, lambda: self.asked.judge(questions, seed=seed))


class StagesJudge:
    """A judge that every pipeline stage holds whole; each answers its share of the questions, side by side.

    Questions of one kind on one prefix stay together, for a judge may read once what they have in common.
    """

    def __init__(self, judge: Judge, mesh: Mesh) -> None:
        self.name = judge.name
        self.deterministic = getattr(judge, "deterministic", False)
        self.silent_on = getattr(judge, "silent_on", ())
        self._judge, self._mesh = judge, mesh

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        """`Judge.judge`, the same on every process of the replica, and so is a SipError of any stage.

        A judgment's seconds are those of the stage that answered.
        """
        groups: dict[Hashable, list[int]] = {}
        for number, question in enumerate(questions):
            key = (type(question), question.prefix) if question.prefix else number
            groups.setdefault(key, []).append(number)
        sizes = [_group_size([questions[number] for number in group]) for group in groups.values()]
        shares = share_out(list(groups.values()), sizes, self._mesh.pp.size)
        return on_stages(
            self._mesh, shares, lambda mine: self._judge.judge([questions[n] for n in mine], seed=seed)
        )


def _group_size(group: Sequence[Question]) -> int:
    """Characters of questions on one prefix, which counts once."""
    texts = [[text for name, text in vars(question).items() if name != "prefix"] for question in group]
    return len(group[0].prefix) + sum(len(text) for each in texts for text in each)
