"""Does work once a model replica, on its first process or spread over its stages, and gives all the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from sip_engine.utils.errors import SipError

if TYPE_CHECKING:
    from sip_engine.distributed.mesh import Mesh

T = TypeVar("T")


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


def interleave(shares: Sequence[Sequence[T]]) -> list[T]:
    """Undo the split of a batch over the data axis, where place i was rank (i % ranks)'s."""
    total = sum(len(share) for share in shares)
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]


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
