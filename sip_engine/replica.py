"""Judges and rewriters that one process of a replica asks on behalf of all: every process gets the same answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from sip_engine.errors import SipError
from sip_engine.mesh import Mesh
from sip_engine.types import Failure, Judge, Judgment, Question, Rewriter, RewriteRequest

T = TypeVar("T")


class ReplicaJudge:
    """A judge that the first process of a replica asks; `judge` is called by all of them."""

    def __init__(self, judge: Judge, mesh: Mesh) -> None:
        self.name = judge.name
        self.deterministic = getattr(judge, "deterministic", False)
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
