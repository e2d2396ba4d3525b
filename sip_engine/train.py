"""The training loop: propose candidates, judge them, choose, update; then log, evaluate, save."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from sip_engine.candidates import propose, reply
from sip_engine.config.objective import LearnsFrom
from sip_engine.config.schema import RunConfig
from sip_engine.distributed.agreement import raised_together
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.judges.overlap import OverlappedJudge, split
from sip_engine.monitoring.empty_steps import EmptySteps
from sip_engine.monitoring.metrics import (
    copy_means,
    flatten,
    group_means,
    pool_means,
    source_means,
    update_metrics,
)
from sip_engine.monitoring.profile import Profiler
from sip_engine.monitoring.step import Step
from sip_engine.monitoring.throughput import StepWork
from sip_engine.objectives.base import rows_of_choices
from sip_engine.objectives.update import update
from sip_engine.policy.rows import Row
from sip_engine.policy.weights import assert_shared
from sip_engine.run import Run, open_run
from sip_engine.types import Candidate, Cost, Kind, Sample, Verdict
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.progress import steps


def train(cfg: RunConfig, mesh: Mesh | None = None, *, profile: int | None = None) -> Path:
    """Train to `cfg.steps`, from the newest checkpoint of `cfg.out` if there is one; returns the last checkpoint.

    mesh: the processes; None for those that `cfg.parallel` lays out, one without torchrun.
    profile: number of a step, from 1, that is made under torch's profiler (`monitoring.profile`); None is none.

    Raises:
        SipError: bad settings or data before anything is written; NonFiniteError and ThresholdError on every
            process at the same step, with the parameters as they were before it. What leaves the run in a state to
            go on from (a limit of judge or drift, a server that is lost, a signal) saves a checkpoint first.
    """
    if profile is not None and not 1 <= profile <= cfg.steps:
        raise ConfigError(f"--profile {profile}: this run makes steps 1 to {cfg.steps}; name one of them")
    mesh = mesh or start_mesh(
        cfg.parallel.tensor,
        cfg.parallel.pipeline,
        seed=cfg.seed,
        timeout_minutes=cfg.parallel.timeout_minutes,
    )
    with (
        open_run(cfg, mesh) as run,
        steps(str(cfg.out), cfg.steps, done=run.step, quiet=not mesh.is_main) as bar,
        run.leaving_well(),
    ):
        empty_steps = EmptySteps(run.records, mesh, run.objective.learns_from)
        run.mark()
        if run.step == 0 or run.owes_evaluation:
            run.evaluate()
            if run.step == cfg.steps:
                run.save()
        profiler = Profiler(cfg.out, profile, mesh, done=run.step)
        alone: dict[str, float] = {}
        while run.step < cfg.steps:
            run.meet(alone)
            with profiler.around(run.step + 1):
                metrics, alone = one_step(run, empty_steps)
            run.step += 1
            run.mark()
            run.records.metrics(run.step, {**metrics, "elapsed": run.elapsed})
            if found := run.monitors.check(run.step):
                run.records.metrics(run.step, {**found, "elapsed": run.elapsed})
            bar.advance(
                {name: metrics[name] for name in ("loss", "reward/rollout", "reward") if name in metrics}
            )
            last = run.step == cfg.steps
            if last or _due(run.step, cfg.eval.every):
                run.evaluate()
            if last or _due(run.step, cfg.checkpoint.every):
                run.save()
            run.writer.poll()
        run.writer.finish()
        empty_steps.conclude(cfg.steps)
        return run.checkpoints / f"step_{run.step:08d}"


def one_step(run: Run, empty_steps: EmptySteps) -> tuple[dict[str, float], dict[str, float]]:
    """Make one update. Returns its metrics, and the seconds that this process worked by itself, by phase.

    Raises:
        SipError: on every process; those that are resumable before anything was updated.
    """
    step = Step(StepWork(run.cfg, run.corpus.tokenizer.vocab_size))
    clock = step.clock
    with raised_together(run.mesh):
        rows = next_rows(run, step)
        step.work.trained(rows)
    run.records.share()
    meant = step.means.over(run.mesh)
    run.thresholds.check_judge(run.step, meant)
    with clock("update"):
        begun = time.perf_counter()
        step.give_back(run.sampler)
        check = partial(run.thresholds.check_drift, run.step)
        stats = update(run.policy, run.reference, rows, run.objective, check)
        alone = {**clock.seconds, "update": run.policy.alone_until - begun}
        if run.reference is not None:
            run.reference.follow(run.policy, run.step + 1)
    clock.split(run.policy.alone_until, "exchange")
    run.timeline.write(run.step + 1, clock.spans)
    learnt = run.objective.metrics({**stats.sums, **stats.maxima})
    metrics = {
        **update_metrics(stats),
        **learnt,
        **meant,
        **flatten("seconds", clock.seconds),
        **step.figures(run.cfg, run.mesh, run.policy, run.reference, run.sampler),
        **empty_steps.metrics(run.step + 1, stats.units),
    }
    return metrics, alone


def next_rows(run: Run, step: Step) -> list[Row]:
    """What the objective makes of this process' share of the next batch, ready to be trained on."""
    with step.clock("data"):
        samples = run.next_samples()
    source_means(step.means, samples, run.corpus.source_names)
    match run.objective.learns_from:
        case LearnsFrom.SAMPLES:
            return [run.objective.row_of_sample(sample) for sample in samples]
        case LearnsFrom.POOLS:
            return self_improve(run, samples, step)
        case LearnsFrom.GENERATIONS:
            return learn_task(run, samples, step)


def self_improve(run: Run, samples: list[Sample], step: Step) -> list[Row]:
    """Candidates of each prefix, judged; what the objective chose of them, ready to be trained on.

    The prefixes come in waves (`judge.waves`): one is generated while the one before it is judged, where the judge
    allows. `seconds/judge` is the time that generation waited for verdicts, `seconds/judge_busy` the time that the
    judge worked, and `judge/lag` the most waves in judgement while another one was generated, 0 or 1.
    """
    cfg, stage = run.cfg, run.cfg.candidates_at(run.step)
    clock, means = step.clock, step.means
    judged = run.objective.needs_judge and stage.num_candidates > 1
    if run.sampler is not None:
        assert_shared(run.sampler.weights, run.policy.model)
    pools: list[list[Candidate]] = []
    verdicts: list[Verdict] = []
    num_failed = 0
    with OverlappedJudge(run.judge, cfg.judge, run.mesh, seed=run.step) as judging:
        for wave in split(samples, cfg.judge.num_waves if judged else 1):
            with clock("generate"):
                proposed = propose(
                    wave,
                    stage,
                    run.sampler,
                    run.rewriter,
                    run.corpus.tokenizer,
                    cfg.sampler,
                    seed=cfg.seed,
                    step=run.step,
                )
            pools += proposed.pools
            for sample, pool in zip(wave, proposed.pools, strict=True):
                written = [len(one.ids) for one in pool if one.kind is Kind.ROLLOUT]
                step.work.sampled(len(sample.prefix_ids), written)
            num_failed += len(proposed.failed_rewrites)
            if judged:
                with clock("judge"):
                    judging.submit(list(zip(wave, proposed.pools, strict=True)))
        if judged:
            with clock("judge"):
                verdicts = judging.verdicts()
            clock.seconds["judge_busy"] = judging.busy
            means.add("judge/lag", judging.lag)
            step.work.judged = sum((verdict.cost for verdict in verdicts), Cost())
    choices = [
        run.objective.choose(sample, pool, verdict, seed=cfg.seed)
        for sample, pool, verdict in zip(samples, pools, verdicts or [None] * len(samples), strict=True)
    ]
    pool_means(means, pools, verdicts, choices)
    copy_means(means, samples, pools)
    means.add("rewriter/failure_rate", num_failed, len(samples) * stage.rewrite)
    run.thresholds.hear(verdicts)
    run.records.pools(run.step, samples, pools, verdicts, choices)
    return rows_of_choices(run.objective, choices)


def learn_task(run: Run, samples: list[Sample], step: Step) -> list[Row]:
    """Generations of each prompt, graded; those that teach something, ready to be trained on."""
    cfg = run.cfg
    assert run.sampler is not None and run.grader is not None
    assert_shared(run.sampler.weights, run.policy.model)
    with step.clock("generate"):
        generations, replies = reply(
            samples,
            n=cfg.objective.generations,
            sampler=run.sampler,
            tokenizer=run.corpus.tokenizer,
            cfg=cfg,
            step=run.step,
        )
    for sample, group in zip(samples, generations, strict=True):
        step.work.sampled(len(sample.prefix_ids), [len(one.ids) for one in group])
    with step.clock("grade"):
        rewards = run.grader.grade(samples, replies, seed=run.step)
    step.work.judged = run.grader.cost
    group_means(step.means, replies, generations, rewards)
    run.records.generations(run.step, samples, replies, rewards)
    graded = zip(samples, generations, rewards, strict=True)
    rows = [run.objective.row_of_group(*group) for group in graded]
    return [row for row in rows if row is not None]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


if __name__ == "__main__":
    import runpy
    import sys

    print(
        "`python -m sip_engine.train` is now `python -m sip_engine train`; this name works in version 0.1 only",
        file=sys.stderr,
    )
    sys.argv = [sys.argv[0], "train", *sys.argv[1:]]
    runpy.run_module("sip_engine", run_name="__main__", alter_sys=True)
