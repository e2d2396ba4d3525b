"""Questions asked of the model: goodput by scale and by checkpoint interval, the best interval, how large a judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sip_engine.accounting.hardware import JudgeModel
from sip_engine.planning.plan import Request, make_plan
from sip_engine.planning.simulate.closed_forms import daly_interval, expected_goodput
from sip_engine.planning.simulate.model import Outcome, simulate
from sip_engine.planning.simulate.scenario import Scenario, scenario_of_plan

SCALES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MANY_STEPS, MOST_STEPS, FAILURES = 3_000, 20_000, 5
"""Steps to simulate at a scale: so many, or, up to a limit, as many as see so many failures."""
MOST_SAVES, MOST_FAILURES = 40_000, 40
"""To simulate of the shortest interval between saves, whichever is reached first; the others as many seconds."""


@dataclass(frozen=True)
class AtScale:
    """One scale's outcome and the interval between saves that Daly's estimate gives it."""

    scenario: Scenario
    outcome: Outcome
    best_interval_s: float

    def as_json(self) -> dict[str, Any]:
        return {
            "gpus": self.scenario.gpus,
            "goodput": self.outcome.goodput,
            "failures": self.outcome.failures,
            "mtbf_s": self.scenario.mtbf,
            "save_every": self.scenario.save_every,
            "best_interval_s": self.best_interval_s,
            "lost_steps": self.outcome.lost_steps,
            "seconds": self.outcome.seconds,
        }


def at_scales(
    scenario_of: Callable[[int], Scenario | None],
    *,
    seconds: float,
    seed: int,
    scales: Sequence[int] = SCALES,
) -> list[AtScale]:
    """The loop at each scale at which there is a scenario, with saves as often as Daly's estimate wants them."""
    found = []
    for gpus in scales:
        plain = scenario_of(gpus)
        if plain is None:
            continue
        best = best_interval(plain)
        tuned = (
            replace(plain, save_every=max(1, round(best / plain.step_s))) if math.isfinite(best) else plain
        )
        steps = max(MANY_STEPS, min(MOST_STEPS, FAILURES * tuned.mtbf / tuned.step_s))
        outcome = simulate(tuned, seconds=min(seconds, steps * tuned.step_s), seed=seed)
        found.append(AtScale(tuned, outcome, best))
    return found


def best_interval(scenario: Scenario) -> float:
    """Seconds of work between saves by Daly's estimate; a save costs what it stops the loop for.

    A write that goes on meanwhile does not cost time but is one more thing to lose: never save faster than it writes.
    """
    if not math.isfinite(scenario.mtbf):
        return math.inf
    return max(daly_interval(scenario.save_stall_s, scenario.mtbf), scenario.save_write_s, scenario.step_s)


def by_interval(scenario: Scenario, *, seed: int) -> list[tuple[float, float, float]]:
    """(seconds of work between saves, goodput, goodput by Daly), from a quarter of the best interval to 512 times it.

    Failures and saves alone: all work between two saves is one step, without stragglers and judge; failures strike at
    the same times whatever the interval. Empty where nothing fails.
    """
    best, mtbf = best_interval(scenario), scenario.mtbf
    found = []
    for power in range(-2, 10) if math.isfinite(best) else ():
        interval = best * 2.0**power
        work = {"generate_s": interval, "judge_s": 0.0, "update_s": 0.0, "chunks": 1, "straggler_spread": 0.0}
        tried = replace(scenario, save_every=1, **work)
        seconds = min(MOST_FAILURES * mtbf, MOST_SAVES * best / 4)
        exact = expected_goodput(interval, scenario.save_stall_s, scenario.restart_s, mtbf)
        if interval < mtbf:
            found.append((interval, simulate(tried, seconds=seconds, seed=seed).goodput, exact))
    return found


def breaks_at(found: Sequence[AtScale], least: float = 0.5) -> str:
    """The first scale whose goodput is below `least`, and what takes most of its time; or that there is none."""
    for one in found:
        if one.outcome.goodput < least:
            waste = {k: v for k, v in one.outcome.seconds.items() if k in ("judge", "save", "restart")}
            lost = one.outcome.lost_steps * one.scenario.step_s
            cause, spent = max([*waste.items(), ("lost steps", lost)], key=lambda item: item[1])
            share = spent / one.outcome.elapsed
            return f"{one.scenario.gpus} GPUs: goodput {one.outcome.goodput:.0%}; {cause} {share:.0%} of the time"
    return (
        f"goodput stays above {least:.0%} up to {found[-1].scenario.gpus} GPUs"
        if found
        else "no scale was simulated"
    )


def judge_gpus_needed(cfg: Any, request: Request, judge: JudgeModel, *, waiting: float = 1 / 3) -> int | None:
    """Fewest GPUs of a judge's own at which the loop waits for it at most this share of a step, by the plan.

    Doubled until it is enough; None where 64 for each of the policy's are not: a verdict's own latency is too long.
    """
    gpus = judge.gpus
    while gpus <= 64 * request.gpus:
        plan = make_plan(cfg, replace(request, judge=judge, judge_gpus=gpus))
        waits = sum(phase.seconds for phase in plan.phases if phase.name == "judge")
        if waits <= waiting * plan.seconds:
            return gpus
        gpus *= 2
    return None


def scaled_scenarios(
    cfg: Any, request: Request, *, save_every: int, changes: dict[str, Any]
) -> Callable[[int], Scenario | None]:
    """Scenarios of a config by number of GPUs: prefixes of a replica and the judge's share stay as they are planned.

    None where a node count cannot hold the layout.
    """
    base = request.gpus

    def scenario_of(gpus: int) -> Scenario | None:
        node = request.hardware.gpu.gpus_per_node
        model = cfg.parallel.tensor * cfg.parallel.pipeline
        if gpus % node or gpus % model:
            return None
        batch = max(gpus // model, round(cfg.batch_size * gpus / base))
        judge_gpus = 0
        if request.judge is not None and request.judge_gpus:
            judge_gpus = max(request.judge.gpus, round(request.judge_gpus * gpus / base))
        larger = cfg.model_copy(update={"batch_size": batch})
        plan = make_plan(larger, replace(request, nodes=gpus // node, judge_gpus=judge_gpus))
        return scenario_of_plan(
            plan, gpus_per_node=node, chunks=cfg.judge.num_waves, save_every=save_every, **changes
        )

    return scenario_of
