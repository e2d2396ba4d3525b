"""`sip reproduce`: stages, then rows over seeds, each in a process of its own; what is done is not done again."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sip_engine.config import RunConfig
from sip_engine.errors import ConfigError, SipError
from sip_engine.files import check_writable, read_json
from sip_engine.progress import console, steps
from sip_engine.reproduction.page import write_page
from sip_engine.reproduction.plan import Plan, load_plan, row_config, run_folder, scaled, stage_config
from sip_engine.reproduction.worker import RESULT, STAGE_RESULT
from sip_engine.run import changed_settings

LOG, PAGE = "log.txt", "reproduction.html"


class RowsFailedError(SipError):
    """Some jobs of a reproduction failed; the others are done."""

    exit_code = 8


@dataclass(frozen=True)
class Job:
    """A stage to make or a run to do, with where its result lies when it is done."""

    title: str
    arguments: tuple[str, ...]
    folder: Path
    result: Path
    settings: dict[str, Any]
    needs: frozenset[Path] = field(default_factory=frozenset)
    """Folders of the jobs that must be done before."""

    def is_done(self) -> bool:
        """Whether the result is there.

        Raises:
            ConfigError: it was made with other settings.
        """
        if not self.result.is_file():
            return False
        found = changed_settings(read_json(self.result)["settings"], self.settings)
        if found:
            raise ConfigError(
                f"{self.folder} was made with other settings ({found[0]}): remove it to make it anew, or choose "
                "another --out"
            )
        return True


def reproduce(
    path: Path,
    out: Path | None,
    *,
    seeds: Sequence[int] = (),
    rows: Sequence[str] = (),
    jobs: int = 0,
    scale: float = 1.0,
) -> Path:
    """Do what is missing of a plan's stages and rows, and write the page; returns its path.

    Args:
        out: in the place of the plan's root. seeds, rows: all of the plan's where empty.
        jobs: processes at once; 0 is one a core, or one where there is a GPU.
        scale: share of all steps and data; below 1 the figures mean nothing.

    Raises:
        ConfigError: a bad plan, seed or row, or results made with other settings; before anything is done.
        RowsFailedError: at the end, if some jobs failed. The page says which.
    """
    plan = scaled(load_plan(path), scale)
    out = plan.root if out is None else out
    check_writable(out, folder=True)
    with _alone(out):
        return _reproduce(path, _chosen(plan, seeds, rows), out, jobs, scale)


def _reproduce(path: Path, plan: Plan, out: Path, jobs: int, scale: float) -> Path:
    runs = list(_row_jobs(plan, path, out, scale))
    every = [*_needed(list(_stage_jobs(plan, path, out, scale)), runs), *runs]
    done = {job.folder for job in every if job.is_done()}
    left = [job for job in every if job.folder not in done]
    jobs = jobs or (1 if torch.cuda.is_available() else _num_cores())
    console.print(f"{out}: {len(left)} of {len(every)} jobs to do, {jobs} at once", soft_wrap=True)
    page = out / PAGE
    failed: dict[str, str] = {}
    with steps("reproduce", len(every), done=len(done)) as bar:
        for job, reason in _run(left, done, jobs):
            if reason is not None:
                failed[job.title] = reason
                console.print(f"{job.title} failed: {reason}", soft_wrap=True, markup=False)
            elif job.result.name == RESULT:
                write_page(plan, out, page, failed=failed)
            bar.advance({"failed": len(failed)})
    write_page(plan, out, page, failed=failed)
    console.print(f"page {page}", soft_wrap=True)
    if failed:
        title, reason = next(iter(failed.items()))
        raise RowsFailedError(f"{len(failed)} of {len(every)} jobs failed, first {title}: {reason}")
    return page


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two at once would write to the same runs; and an end from outside (SIGTERM) ends the jobs too."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{out}: another `sip reproduce` is at work there; wait for it, or stop it"
            ) from None
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _chosen(plan: Plan, seeds: Sequence[int], rows: Sequence[str]) -> Plan:
    known = [row.name for row in plan.rows]
    for name in rows:
        if name not in known:
            raise ConfigError(f"--rows {name}: the plan has no such row; choose of {', '.join(known)}")
    for seed in seeds:
        if seed < 0:
            raise ConfigError(f"--seeds {seed}: must be 0 or more")
    kept = tuple(row for row in plan.rows if not rows or row.name in rows)
    return plan.model_copy(update={"rows": kept, "seeds": tuple(dict.fromkeys(seeds)) or plan.seeds})


def _stage_jobs(plan: Plan, path: Path, out: Path, scale: float) -> Iterator[Job]:
    for stage in plan.stages:
        cfg = stage_config(plan, stage, path.parent, out)
        folder = out / stage.name
        yield Job(
            f"stage {stage.name}",
            (str(path), str(out), str(scale), stage.name),
            folder,
            folder / STAGE_RESULT,
            cfg.model_dump(mode="json"),
            frozenset(out / name for name in stage.needs),
        )


def _needed(stages: list[Job], runs: list[Job]) -> list[Job]:
    """The stages that some run needs, and those that they need."""
    wanted = {folder for run in runs for folder in run.needs}
    for stage in reversed(stages):
        wanted |= stage.needs if stage.folder in wanted else frozenset()
    return [stage for stage in stages if stage.folder in wanted]


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _row_jobs(plan: Plan, path: Path, out: Path, scale: float) -> Iterator[Job]:
    """Seed by seed, so that all rows can be compared early."""
    for seed in plan.seeds:
        for row in plan.rows:
            cfg = row_config(plan, row, seed, out)
            folder = run_folder(out, row, seed)
            yield Job(
                f"{row.name}, seed {seed}",
                (str(path), str(out), str(scale), row.name, str(seed)),
                folder,
                folder / RESULT,
                cfg.model_dump(mode="json"),
                frozenset(_stages_in(plan, cfg, out)),
            )


def _stages_in(plan: Plan, cfg: RunConfig, out: Path) -> Iterator[Path]:
    """The stages that a run's settings read from, and the baseline's."""
    used = [cfg.init, cfg.data.tokenizer]
    used += [cfg.judge.local.checkpoint] if cfg.needs_judge else []
    used += [cfg.rewriter.local.checkpoint] if cfg.needs_rewriter else []
    for stage in plan.stages:
        folder = out / stage.name
        if stage.name == plan.baseline or any(p is not None and p.is_relative_to(folder) for p in used):
            yield folder


def _run(left: list[Job], done: set[Path], jobs: int) -> Iterator[tuple[Job, str | None]]:
    """Each job once it has ended, with the reason if it failed; a job whose needs failed fails too."""
    running: dict[Future[str | None], Job] = {}
    failed: set[Path] = set()
    waiting = list(left)
    processes = _Processes(max(1, _num_cores() // jobs))
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                for job in [j for j in waiting if j.needs & failed]:
                    waiting.remove(job)
                    failed.add(job.folder)
                    yield job, f"{sorted(job.needs & failed)[0].name} failed"
                for job in [j for j in waiting if j.needs <= done][: jobs - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(processes.run, job)] = job
                if not running:
                    continue
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, reason = running.pop(future), future.result()
                    (done if reason is None else failed).add(job.folder)
                    yield job, reason
        finally:
            processes.stop()


class _Processes:
    """The processes that are running, to be stopped with this one."""

    def __init__(self, threads: int) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, job: Job) -> str | None:
        """Run a job to its end, its output to `log.txt`; why it failed, or None."""
        job.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "sip_engine.reproduction.worker", *job.arguments]
        log = job.folder / LOG
        with log.open("ab") as file:
            with self._lock:
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=self._environment,
                )
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        if code == 0 and job.result.is_file():
            return None
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{lines[-1].strip() if lines else 'no output'} (exit code {code}; see {log})"

    def stop(self) -> None:
        """End what still runs; a run resumes from its newest checkpoint next time."""
        with self._lock:
            for process in self._running:
                process.terminate()
