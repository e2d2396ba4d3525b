"""`sip eval`: a checkpoint's figures beside a baseline's, as a table, as eval.json and with every continuation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sip_engine.config.parse import parse_config
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import open_corpus
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.evaluation.answers import answer_set
from sip_engine.evaluation.baseline_cache import kept_evaluation
from sip_engine.evaluation.ground_truth import open_measure
from sip_engine.evaluation.harness import check_harness, run_tasks
from sip_engine.evaluation.held_out import Measure, evaluate, interleave
from sip_engine.evaluation.results import PolicyResults, comparison_table, to_json
from sip_engine.evaluation.sets import EvalSet, load_set
from sip_engine.judges.open import open_judge
from sip_engine.monitoring.supervision import supervised
from sip_engine.policy.checkpoint import checkpoint_tokenizer, read_state, resolve_checkpoint
from sip_engine.sampler.frozen import FrozenPolicy
from sip_engine.sampler.requests import SamplingParams, check_params
from sip_engine.types import Failure, Judge, Judgment, Question, SafetyQuestion, Sample
from sip_engine.utils import heartbeat
from sip_engine.utils.errors import CheckpointError, ConfigError
from sip_engine.utils.files import check_writable, write_json, write_jsonl
from sip_engine.utils.progress import console
from sip_engine.utils.stopping import set_grace

RESULTS, CONTINUATIONS = "eval.json", "continuations.jsonl"


@dataclass(frozen=True)
class Questions:
    """What every policy of one comparison is asked."""

    cfg: RunConfig
    samples: Sequence[Sample]
    judge: Judge
    measure: Measure | None
    sets: Sequence[EvalSet]
    tasks: Sequence[str]
    task_path: Path | None
    limit: int | None
    max_new_tokens: int


class CountedJudge:
    """Passes questions on to a judge, and counts why it failed."""

    def __init__(self, judge: Judge) -> None:
        self.name, self._judge = judge.name, judge
        self.asked, self.failures = 0, Counter[str]()

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        answers = self._judge.judge(questions, seed=seed)
        self.asked += len(answers)
        self.failures.update(answer.reason for answer in answers if isinstance(answer, Failure))
        return answers

    def notes(self, mesh: Mesh) -> list[str]:
        """A line on the failures of all replicas, if there were any."""
        parts = mesh.gather_replicas((self.asked, self.failures))
        failures = sum((found for _, found in parts), Counter[str]())
        if not failures:
            return []
        (reason, times), asked = failures.most_common(1)[0], sum(n for n, _ in parts)
        share = f"{failures.total()} of {asked} answers"
        return [
            f"The {self.name} judge failed at {share}, which count for nothing; {times} of them: {reason}"
        ]


def evaluate_checkpoint(
    checkpoint: Path,
    out: Path,
    settings: dict[str, Any],
    *,
    source: str = "settings",
    baseline: Path | None = None,
    sets: Sequence[str] = (),
    tasks: Sequence[str] = (),
    task_path: Path | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    tensor_parallel: int = 1,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint (and a baseline) into `out`; returns what eval.json holds.

    Args:
        settings: a run's settings, of which documents, judge, sampler and evaluation are read; `source` names them.
        sets: NAME=PATH each, see `evaluation.sets`. limit: items of each set and lm-eval task.
        max_new_tokens: length of answers to sets; None is the length of a suffix.
        kept: folder of baselines' evaluations (`evaluation.kept`): one that is there is not made again. For
            held-out prefixes only, not with sets or tasks.

    Raises:
        CheckpointError, ConfigError, DataError, RequestError: bad input, in one line; no results are written then.
    """
    assert kept is None or not (sets or tasks), "only answers to held-out prefixes are kept"
    check_writable(out, folder=True)
    path = resolve_checkpoint(checkpoint)
    other = resolve_checkpoint(baseline) if baseline else None
    cfg = _settings_for(path, settings, source, tensor_parallel)
    if other is not None:
        _check_same_tokenizer(path, other)
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: must be 1 or more")
    length = cfg.data.suffix_tokens if max_new_tokens is None else max_new_tokens
    check_params(SamplingParams(length, greedy=True))
    loaded = _load_sets(sets, limit)
    set_grace(cfg.faults.grace_s)
    with supervised(cfg.model_copy(update={"out": out})):
        mesh = start_mesh(tensor_parallel)
        if tasks:
            check_harness(mesh)
        with heartbeat.waiting():  # one process may read and tokenize for hours
            corpus = open_corpus(cfg, mesh, checkpoint_tokenizer(path))
        judge, measure = CountedJudge(open_judge(cfg, corpus, mesh)), open_measure(cfg)
        asked = Questions(cfg, corpus.held_out, judge, measure, loaded, tasks, task_path, limit, length)
        with heartbeat.phase("evaluation"):
            base = _ask_baseline(other, asked, mesh, kept) if other is not None else None
            ours = _ask(path, asked, mesh, base)
            safe = _safe_prefixes(judge, corpus.held_out, mesh)
        results = to_json(ours, base, judge.name, safe, knows_coherence=measure is not None)
        results["notes"] += judge.notes(mesh)
        if mesh.is_main:
            _write(out, results, _rows(asked, ours, base))
        mesh.barrier()
    return results


def _write(out: Path, results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write both files, and show what is in the first."""
    write_jsonl(out / CONTINUATIONS, rows)
    write_json(out / RESULTS, results)
    console.print(comparison_table(results))
    for note in results["notes"]:
        console.print(note, soft_wrap=True, markup=False)
    console.print(f"results       {out / RESULTS}\ncontinuations {out / CONTINUATIONS}", soft_wrap=True)


def recorded_settings(checkpoint: Path) -> tuple[dict[str, Any], str]:
    """The settings that a checkpoint carries, and their file.

    Raises:
        CheckpointError: there is no checkpoint. ConfigError: it carries none.
    """
    path = resolve_checkpoint(checkpoint)
    settings = read_state(path).run.get("config")
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{path}: carries no settings (it was imported, not trained); give --config TOML with its documents"
        )
    return settings, f"{path}/state.json"


def _settings_for(path: Path, settings: dict[str, Any], source: str, tensor_parallel: int) -> RunConfig:
    """The settings with the checkpoint's own model, laid out for evaluation."""
    parallel = settings.get("parallel")
    tokens = parallel.get("micro_batch_tokens") if isinstance(parallel, dict) else None
    laid_out = {"tensor": tensor_parallel} | ({"micro_batch_tokens": tokens} if tokens else {})
    model = read_state(path).model.without_fp8().model_dump()
    cfg = parse_config({**settings, "model": model, "parallel": laid_out, "init": None}, source)
    if cfg.task != "policy":
        raise ConfigError(
            f'{source}: task = "{cfg.task}" has prompts for documents; give --config TOML with documents, or see the '
            "evaluations in its metrics.jsonl"
        )
    return cfg


def _check_same_tokenizer(path: Path, other: Path) -> None:
    read_state(other)
    ours, theirs = (checkpoint_tokenizer(p) for p in (path, other))
    if ours.fingerprint != theirs.fingerprint:
        raise CheckpointError(
            f"{other}: a baseline with another tokenizer ({theirs.vocab_size} tokens, the checkpoint's has "
            f"{ours.vocab_size}) would be given other prefixes; choose one with the tokenizer of {path}"
        )


def _load_sets(given: Sequence[str], limit: int | None) -> list[EvalSet]:
    loaded: dict[str, EvalSet] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {one}: must be NAME=PATH, such as xstest=xstest_prompts.csv")
        found = load_set(name, Path(path), limit)
        if found.name in loaded:
            raise ConfigError(f"--set {one}: {found.name} is given twice")
        loaded[found.name] = found
    return list(loaded.values())


def _ask(checkpoint: Path, asked: Questions, mesh: Mesh, base: PolicyResults | None) -> PolicyResults:
    """Load a policy, ask it everything, and let go of it."""
    policy, state = FrozenPolicy.load(checkpoint, mesh)
    policy.micro_batch_tokens = asked.cfg.parallel.micro_batch_tokens
    sampler = policy.sampler(asked.cfg.sampler)
    if mesh.is_main:
        console.print(f"{checkpoint}: {len(asked.samples)} held-out prefixes", soft_wrap=True, markup=False)
    held_out = evaluate(
        policy,
        sampler,
        asked.samples,
        policy.tokenizer,
        asked.judge,
        asked.cfg.judge,
        base.held_out.continuations if base else None,
        asked.measure,
    )
    sets = [
        answer_set(policy, sampler, one, asked.judge, max_new_tokens=asked.max_new_tokens)
        for one in asked.sets
    ]
    tasks = {}
    if asked.tasks:
        with heartbeat.waiting():  # lm-eval does not say how it gets on
            tasks = run_tasks(policy, sampler, asked.tasks, limit=asked.limit, task_path=asked.task_path)
    return PolicyResults(checkpoint, state.step, held_out, sets, tasks)


def _ask_baseline(checkpoint: Path, asked: Questions, mesh: Mesh, kept: Path | None) -> PolicyResults:
    if kept is None:
        return _ask(checkpoint, asked, mesh, None)
    held_out = kept_evaluation(
        kept,
        checkpoint,
        asked.cfg,
        asked.samples,
        mesh,
        lambda: _ask(checkpoint, asked, mesh, None).held_out,
    )
    return PolicyResults(checkpoint, read_state(checkpoint).step, held_out)


def _safe_prefixes(judge: Judge, samples: Sequence[Sample], mesh: Mesh) -> list[bool | None]:
    """Whether the judge calls each prefix safe, as the paper's test prefixes are told apart; None where it failed."""
    mine = samples[mesh.dp.rank :: mesh.dp.size]
    answers = judge.judge([SafetyQuestion(s.prefix) for s in mine]) if mine else []
    safe = [None if isinstance(answer, Failure) else answer.value > 0.5 for answer in answers]
    return interleave(mesh.gather_replicas(safe))


def _rows(asked: Questions, ours: PolicyResults, base: PolicyResults | None) -> list[dict[str, Any]]:
    """A row a held-out prefix with its figures, then a row an item of each set."""
    rows = []
    for number, sample in enumerate(asked.samples):
        row: dict[str, Any] = {"set": "held-out", "prefix": sample.prefix, "original": sample.suffix}
        row["continuation"] = ours.held_out.continuations[number]
        if base is not None:
            row["baseline"] = base.held_out.continuations[number]
        for name, sums in ours.held_out.table.items():
            total, weight = sums[number]
            row[name] = total / weight if weight else None
        rows.append(row)
    for place, answers in enumerate(ours.sets):
        for number, answer in enumerate(answers.rows):
            row = dict(answer)
            if base is not None:
                theirs = base.sets[place].rows[number]
                kept = ("continuation", "logprobs", *answers.table)
                row["baseline"] = {name: theirs[name] for name in kept if name in theirs}
            rows.append(row)
    return rows
