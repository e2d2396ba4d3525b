"""Asks a rewriter once a model replica and gives every process of it all answers."""

from __future__ import annotations

from collections.abc import Sequence

from sip_engine.distributed.mesh import Mesh
from sip_engine.distributed.sharing import on_leader, on_stages, share_out
from sip_engine.types import Failure, Rewriter, RewriteRequest


class ReplicaRewriter:
    """A rewriter that the first process of a replica asks; `rewrite` is called by all of them."""

    def __init__(self, rewriter: Rewriter, mesh: Mesh) -> None:
        self.name = rewriter.name
        self._rewriter, self._mesh = rewriter, mesh

    def rewrite(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[str | Failure]:
        """`Rewriter.rewrite`, the same on every process of the replica, and so is a SipError of it."""
        return on_leader(self._mesh, lambda: self._rewriter.rewrite(requests, seed=seed))


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
