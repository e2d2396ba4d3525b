"""Judges and rewriters that a replica's first process asks, or its stages share: every process gets all answers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from sip_engine.distributed.mesh import Mesh
from sip_engine.types import Failure, Judge, Judgment, Question, Rewriter, RewriteRequest
from sip_engine.utils.errors import SipError

T = TypeVar("T")


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


class ReplicaRewriter:
    """A rewriter that the first process of a replica asks; `rewrite` is called by all of them."""

    def __init__(self, rewriter: Rewriter, mesh: Mesh) -> None:
        self.name = rewriter.name
        self._rewriter, self._mesh = rewriter, mesh

    def rewrite(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[str | Failure]:
        """`Rewriter.rewrite`, the same on every process of the replica, and so is a SipError of it."""
        return on_leader(self._mesh, lambda: self._rewriter.rewrite(requests, seed=seed))


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


class StagesRewriter:
    """A rewriter that every pipeline stage holds whole; each answers its share of the requests, side by side."""

    def __init__(self, rewriter: Rewriter, mesh: Mesh) -> None:
        self.name = rewriter.name
        self._rewriter, self._mesh = rewriter, mesh

    def rewrite(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[str | Failure]:
        """`Rewriter.rewrite`, the same on every process of the replica, and so is a SipError of any stage."""
        sizes = [len(request.suffix) for request in requests]
        shares = share_out([[number] for number in range(len(requests))], sizes, self._mesh.pp.size)
        return on_stages(
            self._mesh, shares, lambda mine: self._rewriter.rewrite([requests[n] for n in mine], seed=seed)
        )


def share_out(groups: Sequence[Sequence[int]], sizes: Sequence[float], num_shares: int) -> list[list[int]]:
    """Numbers in groups -> `num_shares` lists of them, each in rising order, of about the same total size.

    No group is divided; the largest come first, each to the share that is the smallest by then.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0.0] * num_shares
    for number in sorted(range(len(groups)), key=lambda n: -sizes[n]):
        smallest = totals.index(min(totals))
        shares[smallest] += groups[number]
        totals[smallest] += sizes[number]
    return [sorted(share) for share in shares]


def on_stages(mesh: Mesh, shares: Sequence[list[int]], ask: Callable[[list[int]], list[T]]) -> list[T]:
    """What `ask` returns for each stage's share of the numbers 0, 1, ..., in order of the numbers, on all stages.

    `ask` is not called for an empty share. A SipError of any stage is raised on all of them, the first stage's if
    there are several. A collective of the replica: to be called by the main thread of each of its processes.
    """
    mine = shares[mesh.pp.rank]
    found: list[T] | SipError
    try:
        found = ask(mine) if mine else []
    except SipError as error:
        found = error
    answers: dict[int, T] = {}
    for share, part in zip(shares, mesh.gather_stages(found), strict=True):
        if isinstance(part, SipError):
            raise part
        answers |= zip(share, part, strict=True)
    return [answers[number] for number in range(len(answers))]


def _group_size(group: Sequence[Question]) -> int:
    """Characters of questions on one prefix, which counts once."""
    texts = [[text for name, text in vars(question).items() if name != "prefix"] for question in group]
    return len(group[0].prefix) + sum(len(text) for each in texts for text in each)


def on_leader(mesh: Mesh, ask: Callable[[], T]) -> T:
    """What `ask` returns on the first process of a replica, on all of them; a SipError of it is raised on all.

    A collective of the replica: to be called by the main thread of each of its processes.
    """
    found: T | SipError | None = None
    if mesh.replica.is_first:
        try:
            found = ask()
        except SipError as error:
            found = error
    shared = mesh.from_replica_leader(found)
    if isinstance(shared, SipError):
        raise shared
    return shared
