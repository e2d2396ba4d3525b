"""`sip reproduce`: stages, then rows over seeds, each in a process of its own; what is done is not done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from sip_engine.config.parse import find_config
from sip_engine.experiments.reproduction.page import write_page
from sip_engine.experiments.reproduction.plan import (
    Plan,
    arm_config,
    arm_recipe,
    load_plan,
    run_folder,
    scaled,
    stage_recipe,
    stages_of,
)
from sip_engine.experiments.reproduction.provenance import RESULT, STAGE_RESULT, check_begun, check_done
from sip_engine.utils.errors import ConfigError, SipError
from sip_engine.utils.files import check_writable, lock_folder
from sip_engine.utils.progress import console, steps
from sip_engine.utils.regular import open_regular, read_bytes

LOG = "log.txt"


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
    recipe: dict[str, Any]
    """All that decides what comes of it, except what its needs are made of."""
    needs: tuple[Path, ...] = ()
    """Folders of the jobs that must be done before."""

    def is_done(self) -> bool:
        """Whether the result is there.

        Raises:
            ConfigError: it was made, or begun, with other settings or from another making of what it needs.
        """
        if self.result.is_file():
            check_done(self.result, self.recipe, self.needs)
            return True
        check_begun(self.folder, self.recipe, self.needs)
        return False


def reproduce(
    path: Path,
    out: Path | None,
    *,
    seeds: Sequence[int] = (),
    rows: Sequence[str] = (),
    jobs: int = 0,
    scale: float = 1.0,
) -> Path:
    """Do what is missing of a plan's stages and rows, and write the page, named like the plan; returns its path.

    Args:
        out: in the place of the plan's. seeds, rows: all of the plan's where empty.
        jobs: processes at once; 0 is one a core, or one where there is a GPU.
        scale: share of all steps and data; below 1 the figures mean nothing.

    Raises:
        ConfigError: a bad plan, seed or row, or results made with other settings; before anything is done.
        RowsFailedError: at the end, if some jobs failed. The page says which.
    """
    path = find_config(path)
    plan = scaled(load_plan(path), scale)
    out = out or plan.out or plan.root
    check_writable(out, folder=True)
    chosen = _chosen(plan, seeds, rows)
    runs = list(_row_jobs(chosen, path, out, scale))
    every = [*_needed(list(_stage_jobs(plan, path, out, scale)), runs), *runs]
    shown = plan.model_copy(update={"seeds": tuple(dict.fromkeys((*plan.seeds, *chosen.seeds)))})
    with _alone(out) as lock:
        return _reproduce(shown, every, out / f"{path.stem}.html", jobs, lock)


def _reproduce(plan: Plan, every: list[Job], page: Path, jobs: int, lock: int) -> Path:
    out = page.parent
    done = {job.folder for job in every if job.is_done()}
    left = [job for job in every if job.folder not in done]
    jobs = jobs or (1 if torch.cuda.is_available() else _num_cores())
    console.print(f"{out}: {len(left)} of {len(every)} jobs to do, {jobs} at once", soft_wrap=True)
    failed: dict[str, str] = {}
    with steps("reproduce", len(every), done=len(done)) as bar:
        for job, reason in _run(left, done, jobs, lock):
            if reason is not None:
                failed[job.title] = reason
                console.print(f"{job.title} failed: {reason}", soft_wrap=True, markup=False)
            elif job.result.name == RESULT:
                try:
                    write_page(plan, out, page, failed=failed)
                except SipError as error:  # the last one says it again, and the jobs go on until then
                    console.print(f"no page yet: {error}", soft_wrap=True, markup=False)
            bar.advance({"failed": len(failed)})
    write_page(plan, out, page, failed=failed)
    console.print(f"page {page}", soft_wrap=True)
    if failed:
        title, reason = next(iter(failed.items()))
        raise RowsFailedError(f"{len(failed)} of {len(every)} jobs failed, first {title}: {reason}")
    return page


@contextmanager
def _alone(out: Path) -> Iterator[int]:
    """Two at once would write to the same runs.

    Gives the lock's file descriptor. A process that inherits it keeps the folder locked, so that jobs that outlive
    this process (SIGKILL) are not started twice.
    """
    lock = lock_folder(out)
    if lock is None:
        raise ConfigError(
            f"{out}: another `sip reproduce`, or a job that it left, is at work there; wait for it, or stop it"
        )
    with lock:
        yield lock.fileno()


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
        folder = out / stage.name
        yield Job(
            f"stage {stage.name}",
            (str(path), str(out), str(scale), stage.name),
            folder,
            folder / STAGE_RESULT,
            stage_recipe(plan, stage, path.parent),
            tuple(out / name for name in stage.needs),
        )


def _needed(stages: list[Job], runs: list[Job]) -> list[Job]:
    """The stages that some run needs, and those that they need."""
    wanted = {folder for run in runs for folder in run.needs}
    for stage in reversed(stages):
        wanted |= set(stage.needs) if stage.folder in wanted else set()
    # A study of what is made anyhow comes with it.
    wanted |= {s.folder for s in stages if s.recipe["makes"] == "judge_shifts" and wanted >= set(s.needs)}
    return [stage for stage in stages if stage.folder in wanted]


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _row_jobs(plan: Plan, path: Path, out: Path, scale: float) -> Iterator[Job]:
    """Seed by seed, so that all rows can be compared early."""
    for seed in plan.seeds:
        for row in plan.rows:
            cfg = arm_config(plan, row, seed, out)
            folder = run_folder(out, row, seed)
            yield Job(
                f"{row.name}, seed {seed}",
                (str(path), str(out), str(scale), row.name, str(seed)),
                folder,
                folder / RESULT,
                arm_recipe(plan, row, seed),
                tuple(stages_of(plan, cfg, out)),
            )


def _run(left: list[Job], done: set[Path], jobs: int, lock: int) -> Iterator[tuple[Job, str | None]]:
    """Each job once it has ended, with the reason if it failed; a job whose needs failed fails too."""
    running: dict[Future[str | None], Job] = {}
    failed: set[Path] = set()
    waiting = list(left)
    processes = _Processes(max(1, _num_cores() // jobs), lock)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                for job in [j for j in waiting if failed & set(j.needs)]:
                    waiting.remove(job)
                    failed.add(job.folder)
                    yield job, f"{sorted(failed & set(job.needs))[0].name} failed"
                for job in [j for j in waiting if done >= set(j.needs)][: jobs - len(running)]:
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

    def __init__(self, threads: int, lock: int) -> None:
        self._environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        self._kept_open = (lock,)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, job: Job) -> str | None:
        """Run a job to its end, its output to `log.txt`; why it failed, or None."""
        log = job.folder / LOG
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            with open_regular(log, "ab") as file:
                code = self._run(job, file)
            if code == 0 and job.result.is_file():
                return None
            lines = read_bytes(log).decode(errors="replace").strip().splitlines()
        except OSError as error:
            return str(error)
        return f"{lines[-1].strip() if lines else 'no output'} (exit code {code}; see {log})"

    def _run(self, job: Job, file: IO[bytes]) -> int:
        # -P: a checkout in the working directory is not what runs.
        command = [sys.executable, "-P", "-m", "sip_engine.experiments.reproduction.worker", *job.arguments]
        with self._lock:
            if self._stopped:
                return -signal.SIGTERM
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=self._kept_open,
            )
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        """End what still runs and start nothing more; a run resumes from its newest checkpoint next time."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()
