"""The discrete-event model (simpy): the loop, its judge, its saves, and the failures that interrupt it."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from sip_engine.planning.simulate.scenario import Scenario


@dataclass
class Outcome:
    """What became of a simulated run; seconds of the whole run."""

    steps: int = 0
    """Kept: in the last save, or made after it."""
    elapsed: float = 0.0
    failures: int = 0
    lost_steps: int = 0
    """Made and lost again in failures."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By what the loop did: generate, judge (waiting), update, save (stalled), restart, lost."""
    work_s: float = 0.0

    @property
    def goodput(self) -> float:
        """Share of the time in which the policy's GPUs did the work of the kept steps."""
        return self.steps * self.work_s / self.elapsed if self.elapsed else 0.0


def simulate(scenario: Scenario, *, seconds: float, seed: int = 0) -> Outcome:
    """Run the loop for so many seconds of its own time."""
    scenario.check()
    env = simpy.Environment()
    run = _Run(env, scenario, np.random.default_rng(seed))
    env.run(until=seconds)
    outcome = run.outcome
    outcome.elapsed, outcome.steps, outcome.work_s = seconds, run.step, scenario.work_s
    return outcome


class _Run:
    """The loop as one process; each failure interrupts it and sends it back to the newest save on storage."""

    def __init__(self, env: simpy.Environment, scenario: Scenario, draw: np.random.Generator) -> None:
        self.env, self.scenario, self.draw = env, scenario, draw
        self.outcome = Outcome()
        self.step = self.saved = 0
        self.judge = simpy.Resource(env)
        self.storage = simpy.Resource(env)
        self.life = 0
        self.loop = env.process(self._live())
        if math.isfinite(scenario.mtbf):
            env.process(self._fail())

    def _live(self) -> Generator[Any, Any, None]:
        restarting = False
        while True:
            try:
                if restarting:
                    yield from self._spend("restart", self.scenario.restart_s)
                    restarting = False
                while True:
                    yield from self._step()
                    self.step += 1
                    if self.step % self.scenario.save_every == 0:
                        yield from self._save()
            except simpy.Interrupt:
                self.life += 1
                self.outcome.failures += 1
                self.outcome.lost_steps += self.step - self.saved
                self.step, restarting = self.saved, True

    def _step(self) -> Generator[Any, Any, None]:
        s = self.scenario
        judged: list[Any] = []
        for _ in range(s.chunks):
            yield from self._spend("generate", s.generate_s / s.chunks * self._slowest())
            if not s.judge_s:
                continue
            if s.judge_shared:  # it takes turns with the sampler, and waits for its slowest node as well
                yield from self._spend("judge", s.judge_s / s.chunks * self._slowest())
            else:
                judged.append(self.env.process(self._judge()))
        if judged:
            start = self.env.now
            yield self.env.all_of(judged)
            self._count("judge", self.env.now - start)
        yield from self._spend("update", s.update_s * self._slowest())

    def _judge(self) -> Generator[Any, Any, None]:
        """One chunk's questions: their work comes after that of the chunks before, their latency beside it."""
        s = self.scenario
        calls = s.calls / s.chunks
        slowest = self.env.timeout(self._slowest_call(calls))
        with self.judge.request() as turn:
            yield turn
            limit = calls / s.rate_limit if s.rate_limit else 0.0
            yield self.env.timeout(max(s.judge_s / s.chunks, limit))
        yield slowest

    def _save(self) -> Generator[Any, Any, None]:
        """Copy while the loop waits, then write while it goes on; the next copy waits for the last write."""
        start = self.env.now
        turn = self.storage.request()
        try:
            yield turn
            yield self.env.timeout(self.scenario.save_stall_s)
        except simpy.Interrupt:
            turn.cancel()
            if turn.triggered:
                self.storage.release(turn)
            raise
        self._count("save", self.env.now - start)
        self.env.process(self._write(turn, self.step, self.life))
        if not self.scenario.save_write_s:
            self.saved = self.step

    def _write(self, turn: Any, step: int, life: int) -> Generator[Any, Any, None]:
        yield self.env.timeout(self.scenario.save_write_s)
        if life == self.life:  # else a failure took the copy with it
            self.saved = step
        self.storage.release(turn)

    def _fail(self) -> Generator[Any, Any, None]:
        while True:
            yield self.env.timeout(self.draw.exponential(self.scenario.mtbf))
            self.loop.interrupt()

    def _spend(self, what: str, seconds: float) -> Generator[Any, Any, None]:
        start = self.env.now
        try:
            yield self.env.timeout(seconds)
        finally:
            self._count(what, self.env.now - start)

    def _count(self, what: str, seconds: float) -> None:
        self.outcome.seconds[what] = self.outcome.seconds.get(what, 0.0) + seconds

    def _slowest(self) -> float:
        """How much longer the slowest of all nodes takes: the largest of as many log-normal draws."""
        return self._largest(self.scenario.straggler_spread, self.scenario.nodes)

    def _slowest_call(self, calls: float) -> float:
        s = self.scenario
        return s.judge_latency_s * self._largest(s.judge_latency_spread, calls) if calls else 0.0

    def _largest(self, spread: float, number: float) -> float:
        """exp(spread z) for z the largest of `number` normal draws, by one uniform draw."""
        if not spread or number < 1:
            return 1.0
        from scipy.special import ndtri_exp

        return math.exp(spread * float(ndtri_exp(math.log(self.draw.random()) / number)))
