"""Launch scripts: what they say, and the whole life of one under stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_stand_in import HOSTS, StandIn

from sip_engine.cli import main
from sip_engine.config.schema import RunConfig
from sip_engine.distributed.agent import exit_code
from sip_engine.planning.launch.job import Job
from sip_engine.planning.launch.submit import submit_slurm, write_script
from sip_engine.utils.errors import ConfigError, SipError

TRAINER = Path(__file__).with_name("preempted_trainer.py")


def job(**changes: Any) -> Job:
    cfg = RunConfig.model_validate({"batch_size": 64})
    values: dict[str, Any] = {
        "cfg": cfg, "config": Path("run.toml"), "overrides": (), "nodes": 2, "gpus": 2, "name": "run",
    }  # fmt: skip
    return Job(**values | changes)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(tmp_path)
    monkeypatch.setenv("PATH", stand_in.environment["PATH"])
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setenv("STAND_IN_JOB", stand_in.job)
    monkeypatch.chdir(tmp_path)
    return stand_in


def submit(wanted: Job, folder: Path) -> None:
    write_script(wanted, "slurm", folder / "run.sbatch")
    assert submit_slurm(folder / "run.sbatch").startswith("Submitted batch job ")


def await_workers(pipe: Path, count: int) -> set[str]:
    """The ranks that wait to be signalled, once there are `count` of them; fails where they do not come."""
    ranks: list[str] = []
    reader = os.open(pipe, os.O_RDWR)  # open for writing too, so that it never ends between two writers
    try:
        while len(ranks) < count:
            assert select.select([reader], [], [], 180)[0], f"only {ranks} came"
            ranks += os.read(reader, 4096).decode().split()
    finally:
        os.close(reader)
    return set(ranks)


@pytest.mark.slow
def test_a_job_is_preempted_requeued_and_ends(cluster: StandIn, tmp_path: Path) -> None:
    """Two nodes of two: USR1 ahead of the time limit, then TERM as in a preemption, then the end; all ranks alike."""
    os.mkfifo(tmp_path / "waiting")
    submit(job(program=f"{TRAINER} {tmp_path} 8"), tmp_path)
    for restarts, signum in enumerate((signal.SIGUSR1, signal.SIGTERM)):
        script = cluster.start(restarts)
        assert await_workers(tmp_path / "waiting", 4) == {"0", "1", "2", "3"}
        cluster.signal_steps(signum)
        assert cluster.finish(script) == (75, True), (tmp_path / "batch.log").read_text()
    assert cluster.finish(cluster.start(2)) == (0, False)
    saved = [(tmp_path / f"rank-{rank}").read_text().split() for rank in range(4)]
    assert saved == [["3", "6", "8"]] * 4
    log = (tmp_path / "batch.log").read_text()
    assert [f"start {n}," in log for n in (1, 2, 3)] == [True] * 3
    assert log.count("the run ended with 75") == 2
    for host in HOSTS:
        assert (tmp_path / "logs" / f"run-{cluster.job}-{host}.log").exists()


@pytest.mark.slow
def test_a_failure_is_not_requeued(cluster: StandIn, tmp_path: Path) -> None:
    submit(job(program="-m no_such_module"), tmp_path)
    assert cluster.finish(cluster.start(0)) == (1, False)


def test_a_job_that_was_requeued_often_enough_is_not_again(cluster: StandIn, tmp_path: Path) -> None:
    (cluster.bin / "python").write_text("#!/bin/sh\nexit 75\n")
    (cluster.bin / "python").chmod(0o755)
    submit(job(max_requeues=1), tmp_path)
    assert cluster.finish(cluster.start(0)) == (75, True)
    assert cluster.finish(cluster.start(1)) == (75, False)
    assert "not again" in (tmp_path / "batch.log").read_text()


def test_a_node_that_is_not_well_ends_the_job_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = StandIn(tmp_path, {HOSTS[0]: 2, HOSTS[1]: 1})
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setenv("STAND_IN_JOB", cluster.job)
    monkeypatch.chdir(tmp_path)
    submit(job(program="-c 'raise SystemExit(3)'"), tmp_path)
    assert cluster.finish(cluster.start(0)) == (71, False)
    assert "1 GPUs, 2 wanted" in (tmp_path / "logs" / f"run-{cluster.job}-{HOSTS[1]}.log").read_text()


def test_what_sbatch_refuses(cluster: StandIn, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("nothing")
    with pytest.raises(SipError, match="does not look like a batch script"):
        submit_slurm(tmp_path / "bad")


@pytest.mark.parametrize(
    ("codes", "expected"), [([75, 75], 75), ([1, 75, -9], 75), ([-15], 143), ([3, 1], 3), ([0, 7], 7)]
)
def test_the_workers_code_comes_back(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": 0}, "--nodes 0"),
        ({"gpus": 0}, "--gpus-per-node 0"),
        ({"signal_seconds": 5}, "--signal-seconds 5"),
        ({"time": "soon"}, "--time 'soon'"),
        ({"time": "00:05:00"}, "longer than --signal-seconds 600"),
        ({"name": "a; rm"}, "--name"),
        ({"cpus": 1}, "--cpus 1"),
        ({"venv": Path("v"), "container": "c"}, "choose one"),
        ({"mounts": "a:b"}, "--container"),
        ({"nodes": 64}, "batch_size=64 is below the 128"),
        ({"overrides": ("--out", "it's")}, "cannot carry quotes"),
    ],
)
def test_what_cannot_be_is_one_line(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        write_script(job(**changes), "slurm", tmp_path / "x.sbatch")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "x.sbatch").exists()


def test_settings_reach_the_run_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the script's two layers of quotes, for a shell to read."""
    monkeypatch.chdir(tmp_path)
    cluster = StandIn(tmp_path)
    (cluster.bin / "python").write_text(
        f'#!/bin/sh\nfor a in "$@"; do echo "$a"; done >> {tmp_path}/seen-$SLURM_NODEID\n'
    )
    (cluster.bin / "python").chmod(0o755)
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setenv("STAND_IN_JOB", cluster.job)
    given = ("--out", 'a folder/$HOME `x` "y" \\', "--judge.server.url", "http://h:1/v1?a=b&c")
    submit(job(overrides=given, config=Path("my run.toml")), tmp_path)
    assert cluster.finish(cluster.start(0)) == (0, False)
    for number in range(2):
        seen = (tmp_path / f"seen-{number}").read_text().splitlines()
        assert seen[-len(given) - 4 :] == ["-m", "sip_engine", "train", "my run.toml", *given]
        assert f"--node-rank={number}" in seen and f"--master-addr={HOSTS[0]}" in seen


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    Path("run.toml").write_text('out = "runs/first"\nbatch_size = 64\n[model]\nprecision = "bf16"\n')
    main(["launch", "slurm", "run.toml", "--nodes", "2", "--container", "sip.sqsh", "--mounts", "/data:/data",
          "--cpus", "64", "--parallel.tensor", "2", "--dry-run"])  # fmt: skip
    script = capsys.readouterr().out
    assert Path("first.sbatch").read_text() == script.removesuffix("\n")
    assert subprocess.run(["bash", "-n", "first.sbatch"], check=False).returncode == 0
    for line in ("#SBATCH --signal=USR1@600", "#SBATCH --requeue", "export CUDA_DEVICE_MAX_CONNECTIONS=1"):
        assert line in script.splitlines()
    assert "--container-image=sip.sqsh" in script and "train run.toml --parallel.tensor 2" in script
    with pytest.raises(SystemExit) as stopped:
        main(["launch", "slurm", "run.toml", "--nodes", "2"])
    assert stopped.value.code == 2 and "no sbatch" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "launch",
                "slurm",
                "run.toml",
                "--gpu",
                "h100",
                "--script",
                "y.sbatch",
                "--sampler.kv_memory_mb",
                "99999",
            ]
        )
    assert stopped.value.code == 9
    assert not Path("y.sbatch").exists()


def test_a_skypilot_task(tmp_path: Path) -> None:
    """Facts of its schema; and SkyPilot's own check of it, where SkyPilot is installed."""
    path = tmp_path / "run.yaml"
    write_script(job(container=None, venv=Path(".venv"), accelerator="H100"), "skypilot", path)
    task = yaml.safe_load(path.read_text())
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "envs", "setup", "run"}
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:2"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert all(isinstance(value, str) for value in task["envs"].values())
    assert "-m sip_engine train run.toml" in task["run"]
    if find_spec("sky") is not None:
        code = "import sky, sys; sky.Task.from_yaml(sys.argv[1])"
        subprocess.run([sys.executable, "-P", "-c", code, str(path)], check=True, cwd=tmp_path)
