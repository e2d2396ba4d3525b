"""Judging beside generation: while one wave of prefixes is judged, the next one is generated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Protocol, TypeVar, runtime_checkable

from sip_engine.config.judge import JudgeConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.distributed.sharing import on_leader
from sip_engine.judges.distributed import ReplicaJudge
from sip_engine.judges.rewards import judge_pools
from sip_engine.types import Candidate, Judge, Sample, Verdict

T = TypeVar("T")

Pools = Sequence[tuple[Sample, Sequence[Candidate]]]


@runtime_checkable
class RemoteJudge(Judge, Protocol):
    """A judge that waits for others and computes next to nothing here, so that it may work beside generation."""

    def stop(self) -> None:
        """From any thread: make `judge` raise, the call in progress at once and every later one."""
        ...


class OverlappedJudge:
    """Judges the waves of a step, one at a time and never more than one behind their generation.

    A `RemoteJudge` inside a `ReplicaJudge` is asked on a thread, by the first process of the replica alone; the
    others get its verdicts when the main threads of all meet, so that collectives stay on those. Any other judge
    answers in `submit`, on all processes together.

    Every wave is judged with the same seed: a pool's verdict depends on what its questions say and on the seed,
    not on its wave, as far as the judge's answers do not depend on what else is asked with them.

    A context: left by an exception it stops the judge, and waits until the thread has ended.
    """

    lag = 0
    """Most waves in judgement while another one was generated: 0 or 1."""
    busy = 0.0
    """Seconds the judge has worked on what was collected, whether or not anybody waited for it."""

    def __init__(self, judge: Judge | None, cfg: JudgeConfig, mesh: Mesh, *, seed: int) -> None:
        self._judge, self._cfg, self._mesh, self._seed = judge, cfg, mesh, seed
        self._remote: RemoteJudge | None = None
        if isinstance(judge, ReplicaJudge) and isinstance(judge.asked, RemoteJudge):
            self._remote = judge.asked
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")  # started by the first wave
        self._in_judgement = 0
        self._future: Future[tuple[list[Verdict], float]] | None = None
        self._verdicts: list[Verdict] = []

    def __enter__(self) -> OverlappedJudge:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._remote and self._future and not self._future.done():
            self._remote.stop()
        self._thread.shutdown()

    def submit(self, pools: Pools) -> None:
        """Hand over the wave just generated; waits for the one before it. Called by all processes of a replica.

        Raises:
            SipError: the judge's, on every process of the replica alike.
        """
        self.lag = max(self.lag, self._in_judgement)
        self._collect()
        if self._remote is None:
            assert self._judge is not None, "nothing is submitted without a judge"
            self._keep(self._work(self._judge, pools))
            return
        if self._mesh.replica.is_first:
            self._future = self._thread.submit(self._work, self._remote, pools)
        self._in_judgement += 1

    def verdicts(self) -> list[Verdict]:
        """The verdicts on all pools in the order they were handed over, once the last wave is judged.

        Raises:
            SipError: the judge's, on every process of the replica alike.
        """
        self._collect()
        return self._verdicts

    def _collect(self) -> None:
        """Wait for the wave in judgement, if there is one, and share what came of it."""
        if self._in_judgement:
            self._keep(on_leader(self._mesh, self._result))
            self._in_judgement -= 1

    def _result(self) -> tuple[list[Verdict], float]:
        assert self._future is not None
        return self._future.result()

    def _work(self, judge: Judge, pools: Pools) -> tuple[list[Verdict], float]:
        start = time.perf_counter()
        verdicts = judge_pools(judge, self._cfg, pools, seed=self._seed)
        return verdicts, time.perf_counter() - start

    def _keep(self, found: tuple[list[Verdict], float]) -> None:
        verdicts, seconds = found
        self._verdicts += verdicts
        self.busy += seconds


def split(items: Sequence[T], waves: int) -> list[Sequence[T]]:
    """`items` in order, cut into `waves` parts whose sizes differ by one at most; fewer rather than empty ones."""
    number = min(waves, len(items))
    ends = [len(items) * k // max(number, 1) for k in range(number + 1)]
    return [items[begin:end] for begin, end in pairwise(ends)]
