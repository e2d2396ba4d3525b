"""Stand-ins for sbatch, srun, scontrol and nvidia-smi that do what Slurm's do, on one machine.

`StandIn` is the controller: it takes a script, runs it with the variables a job gets, signals the tasks of its steps,
and starts a requeued job again with SLURM_RESTART_COUNT one higher. As in Slurm: `--signal` goes to the process group
of every task and not to the batch shell; srun starts one task a node, passes on the signals that it gets, gives the
others `--wait` seconds when one has ended, writes a log a node, and ends with the highest code of its tasks.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

HOSTS = ("127.0.0.1", "127.0.0.2")
"""Two addresses of this machine, which both answer."""


class StandIn:
    """One cluster of two nodes in `folder`; commands lie in `folder/bin`."""

    def __init__(self, folder: Path, gpus: dict[str, int] | None = None) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        self.gpus = gpus or dict.fromkeys(HOSTS, 2)
        self.job = str(_free_port() - 20000)
        for name in ("sbatch", "srun", "scontrol", "nvidia-smi"):
            command = self.bin / name
            command.write_text(f'#!/bin/sh\nexec {sys.executable} -S -P {__file__} {name} "$@"\n')
            command.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "STAND_IN": str(folder),
            "STAND_IN_JOB": self.job,
            **{f"STAND_IN_GPUS_{HOSTS.index(host)}": str(n) for host, n in self.gpus.items()},
        }

    def submitted(self) -> Path:
        """The script that sbatch took last."""
        return self.folder / "submitted.sbatch"

    def start(self, restarts: int) -> subprocess.Popen[bytes]:
        """Begin the batch script, as the first or a later time."""
        shutil.rmtree(self.folder / "tasks", ignore_errors=True)
        (self.folder / "requeued").unlink(missing_ok=True)
        variables = {
            "SLURM_JOB_ID": self.job,
            "SLURM_JOB_NAME": "run",
            "SLURM_JOB_NODELIST": ",".join(HOSTS),
            "SLURM_JOB_NUM_NODES": str(len(HOSTS)),
        }
        if restarts:
            variables["SLURM_RESTART_COUNT"] = str(restarts)
        log = (self.folder / "batch.log").open("ab")
        return subprocess.Popen(
            ["bash", str(self.submitted())],
            env=self.environment | variables,
            cwd=self.folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def signal_steps(self, signum: int) -> None:
        """What Slurm does ahead of a time limit (USR1) and at a preemption (TERM)."""
        for task in (self.folder / "tasks").iterdir():
            os.killpg(int(task.name), signum)

    def finish(self, script: subprocess.Popen[bytes]) -> tuple[int, bool]:
        """Wait for the script to end; its code, and whether the job is requeued."""
        code = script.wait(timeout=240)
        return code, (self.folder / "requeued").exists()


def _free_port() -> int:
    """A port from 20000 to 39999, from which the script makes one of the job's number, that nobody listens at."""
    for port in range(20000 + os.getpid() % 19000, 40000):
        with socket.socket() as one:
            if one.connect_ex((HOSTS[0], port)):
                return port
    raise OSError("no port is free")


def _sbatch(arguments: list[str], home: Path) -> int:
    text = Path(arguments[-1]).read_text()
    if not text.startswith("#!"):
        print("sbatch: error: This does not look like a batch script.", file=sys.stderr)
        return 1
    (home / "submitted.sbatch").write_text(text)
    print(f"Submitted batch job {os.environ['STAND_IN_JOB']}")
    return 0


def _scontrol(arguments: list[str], home: Path) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print("\n".join(arguments[2].split(",")))
        return 0
    assert arguments == ["requeue", os.environ["STAND_IN_JOB"]], arguments
    (home / "requeued").touch()
    return 0


def _nvidia_smi(arguments: list[str], home: Path) -> int:
    gpus = int(os.environ[f"STAND_IN_GPUS_{os.environ['SLURM_NODEID']}"])
    for number in range(gpus):
        print(f"GPU {number}: stand-in" if arguments == ["--list-gpus"] else "0")
    return 0


def _srun(arguments: list[str], home: Path) -> int:
    options: dict[str, str] = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            options[name] = value
    first = next(i for i, a in enumerate(arguments) if not a.startswith("--"))
    names = {"%x": os.environ["SLURM_JOB_NAME"], "%j": os.environ["SLURM_JOB_ID"]}
    (home / "tasks").mkdir(exist_ok=True)
    tasks: dict[int, subprocess.Popen[bytes]] = {}
    for number, host in enumerate(HOSTS):
        path = options["output"].replace("%N", host)
        for mark, value in names.items():
            path = path.replace(mark, value)
        with open(path, "ab" if options.get("open-mode") == "append" else "wb") as log:
            task = subprocess.Popen(
                arguments[first:],
                env=os.environ | {"SLURM_NODEID": str(number), "SLURMD_NODENAME": host},
                stdout=log,
                stderr=log,
                process_group=0,
            )
        tasks[task.pid] = task
        (home / "tasks" / str(task.pid)).touch()
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, lambda got, _: [os.killpg(pid, got) for pid in tasks])
    signal.signal(signal.SIGALRM, lambda *_: [os.killpg(pid, signal.SIGKILL) for pid in tasks])
    codes = []
    while tasks:
        pid, status = os.wait()
        tasks.pop(pid)
        (home / "tasks" / str(pid)).unlink()
        code = os.waitstatus_to_exitcode(status)
        codes.append(code if code >= 0 else 128 - code)
        signal.alarm(int(options["wait"]) if tasks else 0)
    return max(codes)


if __name__ == "__main__":
    commands = {"sbatch": _sbatch, "srun": _srun, "scontrol": _scontrol, "nvidia-smi": _nvidia_smi}
    sys.exit(commands[sys.argv[1]](sys.argv[2:], Path(os.environ["STAND_IN"])))
