"""Writing a launch script, and handing it to the scheduler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from sip_engine.planning.launch.job import Job
from sip_engine.utils.errors import ConfigError, SipError
from sip_engine.utils.files import check_writable, write_atomic

TEMPLATES = {"slurm": "slurm.sh.j2", "skypilot": "skypilot.yaml.j2"}


def write_script(job: Job, scheduler: str, path: Path) -> str:
    """Check a job, write its script and return it; the folder of its logs is made, since Slurm makes none.

    Raises:
        ConfigError: the job cannot be. DataError: the script cannot be written there.
    """
    job.check()
    script = job.render(TEMPLATES[scheduler])
    check_writable(path)
    write_atomic(path, script)
    if scheduler == "slurm":
        job.logs.mkdir(parents=True, exist_ok=True)
    return script


def submit_slurm(path: Path) -> str:
    """Give a script to sbatch; returns what it says.

    Raises:
        ConfigError: there is no sbatch here. SipError: it refused the job, with its words.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            f"there is no sbatch on this machine: {path} is written; submit it where there is, or --dry-run"
        )
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SipError(f"sbatch refused {path}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
