"""A run opened for training: every part built, the newest checkpoint restored, records ready."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from rich.markup import escape

from sip_engine.candidates import reply
from sip_engine.config.parse import changed_settings
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus, open_corpus
from sip_engine.distributed.agreement import raise_agreed_stop, stop_flag
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.files import baseline_hash, read_baseline, write_evaluation
from sip_engine.evaluation.ground_truth import open_measure
from sip_engine.evaluation.held_out import Evaluation, Measure, evaluate
from sip_engine.judges.open import open_judge
from sip_engine.monitoring.metrics import flatten
from sip_engine.monitoring.monitors import Monitors
from sip_engine.monitoring.records import Mark, Records
from sip_engine.monitoring.sessions import session
from sip_engine.monitoring.slow import PHASES, SlowRanks
from sip_engine.monitoring.thresholds import Thresholds
from sip_engine.monitoring.timeline import Timeline
from sip_engine.objectives.base import Objective, open_objective
from sip_engine.policy.checkpoint import (
    CheckpointState,
    CheckpointWriter,
    checkpoint_tokenizer,
    load_checkpoint,
    load_weights,
    resolve_checkpoint,
)
from sip_engine.policy.checkpoint_files import newest_intact, remove_stale
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.policy.rows import row_of
from sip_engine.policy.weights import assert_shared, weight_views
from sip_engine.rewriters.open import open_rewriter
from sip_engine.sampler.sampler import Sampler
from sip_engine.tasks.evaluate import evaluate_task
from sip_engine.tasks.graders import Grader, RewriteGrader, VerdictGrader
from sip_engine.types import Judge, Rewriter, Sample
from sip_engine.utils import heartbeat
from sip_engine.utils.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    SipError,
    Stopped,
    ThresholdError,
)
from sip_engine.utils.files import check_writable, lock_folder, release_folder, write_json
from sip_engine.utils.progress import console
from sip_engine.utils.stopping import deferred


@dataclass
class Run:
    """All parts of a run on this process; `step` counts the updates made."""

    cfg: RunConfig
    mesh: Mesh
    corpus: Corpus
    objective: Objective
    policy: Policy
    reference: Reference | None
    sampler: Sampler | None
    judge: Judge | None
    """None where nothing is judged, as in a judge's own training: known answers grade it."""
    rewriter: Rewriter | None
    measure: Measure | None
    records: Records
    monitors: Monitors
    thresholds: Thresholds
    writer: CheckpointWriter
    timeline: Timeline
    grader: Grader | None = None
    step: int = 0
    baseline: list[str] | None = None
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    owes_evaluation: bool = False
    """An evaluation of this step was begun, or is to be, and a checkpoint taken before its end."""
    slow: SlowRanks = field(default_factory=lambda: SlowRanks(0.0))
    _spent: float = 0.0
    _mark: dict[str, Any] = field(default_factory=dict)
    _saved_step: int = -1
    _opened: float = field(default_factory=time.monotonic)

    @property
    def checkpoints(self) -> Path:
        return self.cfg.out / "checkpoints"

    @property
    def elapsed(self) -> float:
        """Seconds this run has taken so far, over all its restarts."""
        return self._spent + time.monotonic() - self._opened

    def next_samples(self) -> list[Sample]:
        """This process' share of the next global batch."""
        return self.corpus.stream.next_batch(self.cfg.batch_size, self.mesh.dp.rank, self.mesh.dp.size)

    def mark(self) -> None:
        """This moment, between two steps, is one that a checkpoint may be taken of until the next update is made."""
        heartbeat.enter("between steps", self.step + 1)
        self._mark = self.corpus.stream.state_dict()

    def meet(self, seconds: Mapping[str, float]) -> None:
        """Between two steps: say who was slow in the last one, and end together if a signal came to any process.

        seconds: this process' own, by phase, of the last step.

        Raises:
            Stopped: on every process.
        """
        rows = self.mesh.table([stop_flag(), *(seconds.get(phase, 0.0) for phase in PHASES)])
        lines = self.slow.see(self.step, [row[1:] for row in rows])
        for line in lines if self.mesh.is_main else ():
            console.print(f"watch out: {line}", soft_wrap=True)
        raise_agreed_stop(rows)

    @contextmanager
    def leaving_well(self) -> Iterator[None]:
        """Within it signals wait for `meet` and the like; what is raised on all processes alike saves the run first.

        The checkpoint is of the last mark: of a step that was not finished, nothing is left.
        """
        try:
            with deferred():
                yield
        except SipError as error:
            if not error.resumable:
                raise
            with deferred():
                saved = self._save_mark()
            if isinstance(error, Stopped):
                raise Stopped(error.signum, f"{error}: {saved}") from None
            if self.mesh.is_main:
                console.print(saved, soft_wrap=True, markup=False)
            raise

    def _save_mark(self) -> str:
        """Save the last mark where that is not done; says what is saved."""
        if self.step == 0:
            return "no step was finished, so there is nothing to save"
        try:
            if self._saved_step != self.step:
                self.corpus.stream.load_state_dict(self._mark)
                self.save()
            self.writer.finish()
        except SipError as error:
            return f"step {self.step} could not be saved ({error})"
        return f"step {self.step} of {self.cfg.steps} is saved; the same command goes on from there"

    def save(self) -> Path:
        """Write a checkpoint of this moment, or begin to (`checkpoint.asynchronous`).

        Raises:
            NonFiniteError: on every process; the parameters are ruined, and the checkpoints before stay as they are.
            CheckpointError: on every process; it cannot be written.
        """
        with self.timeline.phase("save", self.step):
            path = self._save()
        self._saved_step = self.step
        return path

    def _save(self) -> Path:
        if not self.policy.stands([row_of(self.corpus.held_out[0])]):
            raise NonFiniteError(
                f"step {self.step}: the parameters, or a loss or gradient under them, are not finite: they are not "
                "saved, the run goes on from the checkpoint before; lower optimizer.lr"
            )
        state = CheckpointState(
            self.step,
            self.cfg.model,
            self.corpus.tokenizer.vocab_size,
            {
                "stream": self.corpus.stream.state_dict(),
                "config": self.cfg.model_dump(mode="json"),
                "elapsed": self.elapsed,
                "evaluated": not self.owes_evaluation,
                "baseline": baseline_hash(self.cfg.out) if self.mesh.is_main else None,
                "records": {name: mark.model_dump() for name, mark in self.records.marks().items()},
            },
        )
        return self.writer.save(self.policy, self.reference, state, self.corpus.tokenizer)

    def evaluate(self) -> Evaluation:
        """Evaluate now; the first evaluation's continuations become the baseline of the later ones."""
        self.owes_evaluation = True
        with self.timeline.phase("evaluation", self.step):
            result = self._evaluate()
        self.owes_evaluation = False
        return result

    def _evaluate(self) -> Evaluation:
        if self.sampler is not None:
            assert_shared(self.sampler.weights, self.policy.model)
        sampler = self.sampler if self.cfg.eval.generate else None
        if self.grader is not None:
            greedy = None
            if sampler is not None:
                greedy = partial(
                    reply,
                    sampler=sampler,
                    tokenizer=self.corpus.tokenizer,
                    cfg=self.cfg,
                    n=1,
                    step=self.step,
                    greedy=True,
                )
            result = evaluate_task(self.policy, self.corpus.held_out, greedy, self.grader, seed=self.cfg.seed)
        else:
            result = evaluate(
                self.policy,
                sampler,
                self.corpus.held_out,
                self.corpus.tokenizer,
                self.judge,
                self.cfg.judge,
                self.baseline,
                self.measure,
            )
        if self.baseline is None and sampler is not None:
            self.baseline = result.continuations
        self.evaluations[self.step] = result
        self.records.metrics(self.step, {**flatten("eval", result.figures), "elapsed": self.elapsed})
        if self.mesh.is_main:
            write_evaluation(self.cfg.out, self.step, result, self.corpus.held_out)
        return result


@contextmanager
def open_run(cfg: RunConfig, mesh: Mesh) -> Iterator[Run]:
    """Build all parts of a run and restore its newest checkpoint, if it has one; its folder is ours meanwhile.

    Raises:
        ConfigError, DataError, CheckpointError: before anything of the run is written.
    """
    if cfg.batch_size < mesh.dp.size:
        raise ConfigError(
            f"batch_size={cfg.batch_size} is below the {mesh.dp.size} data-parallel processes; raise it"
        )
    check_writable(cfg.out, folder=True)
    with _sole_writer(cfg.out, mesh):
        run = _build(cfg, mesh)
        at_work = mesh.is_main and run.step < cfg.steps
        try:
            with session(cfg.out, mesh.size, lambda: run.step, enabled=at_work):
                yield run
        except (
            NonFiniteError,
            ThresholdError,
        ):  # raised on every process alike: a save that has begun can end
            run.writer.finish()
            raise
        finally:
            run.records.close()
            run.timeline.close()


def _build(cfg: RunConfig, mesh: Mesh) -> Run:
    opened = time.monotonic()
    init = resolve_checkpoint(cfg.init) if cfg.init else None
    if mesh.is_main:
        remove_stale(cfg.out / "checkpoints")
    resume, faults = newest_intact(cfg.out / "checkpoints", mesh)
    carried = resume or init
    with heartbeat.waiting():  # one process may read and tokenize for hours
        corpus = open_corpus(cfg, mesh, checkpoint_tokenizer(carried) if carried else None)
    vocab_size = corpus.tokenizer.vocab_size
    policy = Policy(cfg, vocab_size, mesh)
    reference = Reference(cfg, vocab_size, mesh) if cfg.needs_reference else None
    if resume:
        start = _restore(resume, cfg, corpus, policy, reference)
    else:
        start = _Start()
        _initialise(init, cfg, vocab_size, policy, reference)
    judge = open_judge(cfg, corpus, mesh) if cfg.needs_judge else None
    records = Records(
        cfg.out,
        from_step=start.step + (start.step > 0),
        pools_every=cfg.log_rollouts_every,
        enabled=mesh.is_main,
        mesh=mesh,
        cfg=cfg,
        marks=start.marks,
    )
    run = Run(
        cfg=cfg,
        mesh=mesh,
        corpus=corpus,
        objective=open_objective(cfg.objective),
        policy=policy,
        reference=reference,
        sampler=_open_sampler(cfg, policy, vocab_size, mesh),
        judge=judge,
        rewriter=open_rewriter(cfg, corpus, mesh) if cfg.needs_rewriter else None,
        measure=open_measure(cfg),
        records=records,
        monitors=Monitors(cfg, records, mesh),
        thresholds=Thresholds(cfg),
        writer=CheckpointWriter(
            cfg.out / "checkpoints",
            mesh,
            keep=cfg.checkpoint.keep,
            keep_every=cfg.checkpoint.keep_every,
            asynchronous=cfg.checkpoint.asynchronous,
        ),
        timeline=Timeline(cfg.out, mesh.rank, every=cfg.tracking.timeline_every),
        grader=_grader(cfg, judge),
        step=start.step,
        baseline=start.baseline,
        owes_evaluation=start.owes_evaluation,
        slow=SlowRanks(cfg.faults.slow_factor),
        _spent=start.elapsed,
        _saved_step=start.step if resume else -1,
        _opened=opened,
    )
    if mesh.is_main:
        _announce(run, start, faults)
    return run


@dataclass(frozen=True)
class _Start:
    """Where a run goes on from: before the first step, unless a checkpoint says otherwise."""

    step: int = 0
    elapsed: float = 0.0
    """Seconds that the run had taken by then."""
    settings: dict[str, Any] | None = None
    """Those that the checkpoint was written under."""
    owes_evaluation: bool = False
    baseline: list[str] | None = None
    marks: Mapping[str, Mark] = field(default_factory=dict)
    """What the records held then."""


def _restore(
    checkpoint: Path, cfg: RunConfig, corpus: Corpus, policy: Policy, reference: Reference | None
) -> _Start:
    """Bring policy, reference and the stream of documents to where the checkpoint left them."""
    state = load_checkpoint(
        checkpoint, policy, reference, cfg.model, corpus.tokenizer.vocab_size, verified=True
    )
    going_on = _run_state(checkpoint, state)
    corpus.stream.load_state_dict(going_on.stream)
    return _Start(
        step=state.step,
        elapsed=going_on.elapsed,
        settings=going_on.config,
        owes_evaluation=not going_on.evaluated,
        baseline=read_baseline(cfg.out, corpus.held_out, policy.mesh, going_on.baseline),
        marks=going_on.records,
    )


def _initialise(
    init: Path | None, cfg: RunConfig, vocab_size: int, policy: Policy, reference: Reference | None
) -> None:
    """Begin from another checkpoint's weights, if there is one; the reference is the policy as it begins."""
    if init:
        load_weights(init, policy.model, cfg.model, vocab_size)
        policy.optimizer.reload_model_params()
    if reference is not None:
        reference.copy_from(policy)


def _open_sampler(cfg: RunConfig, policy: Policy, vocab_size: int, mesh: Mesh) -> Sampler | None:
    if not cfg.needs_sampler:
        return None
    return Sampler(weight_views(policy.model, vocab_size, mesh.tp.rank), mesh, cfg.sampler)


def _announce(run: Run, start: _Start, faults: Sequence[str]) -> None:
    """Say where the run stands and which settings differ from the checkpoint's; leave its settings in its folder."""
    cfg, name = run.cfg, f"[bold]{escape(str(run.cfg.out))}[/]"
    say = partial(console.print, markup=True, soft_wrap=True)
    for fault in faults:
        say(f"{name}: set aside: {escape(fault)}")
    settings = cfg.model_dump(mode="json")
    write_json(cfg.out / "config.json", settings)
    found = f"resuming at step {start.step} of {cfg.steps}" if start.step else "starting"
    if start.step >= cfg.steps:
        found = f"found complete, at step {start.step}; remove the folder to train anew"
    for change in changed_settings(start.settings, settings):
        say(f"{name}: changed since the checkpoint: {escape(change)}")
    say(f"{name}: {found}; {escape(run.corpus.description)}")


@contextmanager
def _sole_writer(folder: Path, mesh: Mesh) -> Iterator[None]:
    """Hold a run's folder on the main process; all raise ConfigError where another run is at work in it."""
    lock = lock_folder(folder) if mesh.is_main else None
    if mesh.broadcast(lock is None):
        raise ConfigError(
            f"{folder}: another run is at work there; wait for it, stop it, or choose another --out"
        )
    try:
        yield
    finally:
        if lock is not None:
            release_folder(folder, lock)


class _RunState(BaseModel, strict=True):
    """A run's own part of a checkpoint's state."""

    stream: dict[str, Any]
    config: dict[str, Any]
    elapsed: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    evaluated: bool = True
    """False where an evaluation of its step is still to be made."""
    baseline: str | None = None
    """SHA-256 of the first evaluation's continuations, to which all later ones are compared."""
    records: dict[str, Mark] = Field(default_factory=dict)
    """What each file of records held."""


def _run_state(checkpoint: Path, state: CheckpointState) -> _RunState:
    try:
        return _RunState.model_validate(state.run)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in ("run", *fault["loc"]))
        raise CheckpointError(
            f"{checkpoint}: no run can go on from its state.json ({where}: {fault['msg']}); start a new one with init"
        ) from None


def _grader(cfg: RunConfig, judge: Judge | None) -> Grader | None:
    if cfg.task == "policy":
        return None
    if cfg.task == "judge":
        return VerdictGrader()
    assert judge is not None, "a rewriter in training needs a judge"
    return RewriteGrader(judge, cfg.judge.votes)
