"""What the model is told: times of a step's parts, chances of failure, saving, the judge; each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sip_engine.monitoring.records import METRICS, read_records
from sip_engine.planning.plan import Plan
from sip_engine.utils.errors import ConfigError, DataError

FAILURES_PER_GPU_HOUR = 419 / (54 * 24 * 16384)
"""Unplanned interruptions: 419 in 54 days on 16,384 H100s (The Llama 3 Herd of Models, arXiv 2407.21783, 3.3.4).
Another cluster's 6.5 failures in a thousand days of a node of 8 are 1.7 times as many (arXiv 2410.21680)."""
STRAGGLER_SPREAD = 0.03
"""Standard deviation of the logarithm of one node's time for a part of a step (an assumption; a step waits for the
slowest)."""
RESTART_S = 300.0
"""From a failure to the first step: notice it, requeue, start, load (an assumption)."""


@dataclass(frozen=True)
class Scenario:
    """One run on one cluster. Seconds are of an undisturbed node; a step's parts follow each other."""

    gpus: int
    gpus_per_node: int
    generate_s: float
    """Prefill and decode of a step's rollouts, all chunks together."""
    judge_s: float
    """Of a step's questions, when the judge works on nothing else."""
    update_s: float
    """Reference, update, optimizer, communication."""
    chunks: int = 1
    """A chunk is judged while the next one is generated; 1 judges after all are generated."""
    judge_shared: bool = False
    """The judge stands on the policy's GPUs: it then works while nothing is generated, on all nodes."""
    judge_latency_s: float = 0.0
    """Of one call, from end to end, when others are answered beside it: no chunk is judged in less."""
    judge_latency_spread: float = 0.3
    """Standard deviation of the logarithm of a call's latency (an assumption); a chunk waits for its slowest call."""
    calls: int = 0
    """Judge calls of a step."""
    rate_limit: float | None = None
    """Calls a second that the judge's server takes; None for no limit."""
    save_stall_s: float = 0.0
    """For which a save stops the loop: a copy to the host's memory, or everything."""
    save_write_s: float = 0.0
    """Until the copy is on storage; the loop goes on meanwhile, and what fails before goes back one save further."""
    save_every: int = 100
    """Steps."""
    failures_per_gpu_hour: float = FAILURES_PER_GPU_HOUR
    restart_s: float = RESTART_S
    straggler_spread: float = STRAGGLER_SPREAD

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def mtbf(self) -> float:
        """Seconds between failures of the whole run; infinite where nothing fails."""
        rate = self.failures_per_gpu_hour * self.gpus / 3600
        return 1 / rate if rate else float("inf")

    @property
    def work_s(self) -> float:
        """What a step needs of the policy's GPUs: all but waiting for a judge that stands elsewhere."""
        return self.generate_s + self.update_s + (self.judge_s if self.judge_shared else 0.0)

    @property
    def step_s(self) -> float:
        """A step without stragglers, failures and saves; of chunks that generator and judge pass on to each other."""
        if self.judge_shared or not self.judge_s:
            return self.work_s
        limit = self.calls / self.rate_limit if self.rate_limit else 0.0
        generate, judge = self.generate_s / self.chunks, max(self.judge_s, limit) / self.chunks
        last = generate + (self.chunks - 1) * max(generate, judge) + judge
        return max(last, self.generate_s + self.judge_latency_s) + self.update_s

    def check(self) -> None:
        """Raise ConfigError for numbers that cannot be."""
        for name in ("generate_s", "judge_s", "update_s", "save_stall_s", "save_write_s", "restart_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.failures_per_gpu_hour < 0:
            raise ConfigError(
                f"--failures {self.failures_per_gpu_hour}: failures of a GPU an hour, 0 or more"
            )
        if self.rate_limit is not None and self.rate_limit <= 0:
            raise ConfigError(f"--rate-limit {self.rate_limit:g}: calls a second must be above 0")
        if min(self.gpus, self.gpus_per_node, self.chunks, self.save_every) < 1:
            raise ConfigError("gpus, chunks and steps between saves must be 1 or more")
        if not self.work_s:
            raise ConfigError("a step takes no time: nothing to simulate")


def scenario_of_plan(
    plan: Plan, *, gpus_per_node: int, chunks: int, save_every: int, **changes: float | bool | None
) -> Scenario:
    """The step of a plan. Saves: a copy over the host's link stops the loop, storage is written meanwhile."""
    by_name: dict[str, float] = {}
    for phase in plan.phases:
        by_name[phase.name] = by_name.get(phase.name, 0.0) + phase.seconds
    save = next((phase for phase in plan.phases if phase.name == "save"), None)
    generate = by_name.pop("prefill", 0.0) + by_name.pop("decode", 0.0)
    by_name.pop("judge", None)
    by_name.pop("save", None)
    values = {
        "judge_s": plan.judge_alone_s,
        "save_stall_s": 0.0 if save is None else save.bytes / 50e9,
        "save_write_s": 0.0 if save is None else save.seconds * save_every,
        **changes,
    }
    return Scenario(
        gpus=plan.gpus,
        gpus_per_node=gpus_per_node,
        generate_s=generate,
        update_s=sum(by_name.values()),
        chunks=chunks,
        save_every=save_every,
        calls=plan.judge_calls,
        **values,  # type: ignore[arg-type]
    )


def scenario_of_run(folder: Path) -> Scenario:
    """The mean step that a run's records show, on one node where nothing fails; its evaluations do not count.

    Raises:
        DataError: the folder has no records of steps with times.
    """
    path = folder / METRICS
    if not path.exists():
        raise DataError(f"{path}: no records of a run; give the folder of one")
    steps = [row for row in read_records(path) if "seconds/update" in row]
    if not steps:
        raise DataError(f"{path}: holds no step with times (seconds/update)")

    def mean(*names: str) -> float:
        return sum(row.get(f"seconds/{name}", 0.0) for row in steps for name in names) / len(steps)

    return Scenario(
        gpus=1,
        gpus_per_node=1,
        generate_s=mean("data", "generate"),
        judge_s=mean("judge", "grade"),
        update_s=mean("update"),
        failures_per_gpu_hour=0.0,
        straggler_spread=0.0,
        judge_latency_spread=0.0,
    )
