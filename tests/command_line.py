"""Runs the command line within a test, and reads what it says."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sip_engine import cli
from sip_engine.distributed.mesh import Mesh

Sip = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sip(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Sip:
    """Runs a command in this process -> (exit code, standard output, standard error)."""
    monkeypatch.setattr(cli, "_leave_process_group", lambda: None)  # the other tests' group
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            cli.main([str(arg) for arg in args])
            code = 0
        except SystemExit as leave:
            code = int(leave.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever waits for three minutes is interrupted; `signal.alarm(180)` begins them anew."""

    def too_long(signum: int, frame: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write_texts(folder: Path, count: int = 60) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = ["river", "stone", "green", "walks", "over", "the", "old", "bridge", "at", "night"]
    for number in range(count):
        sentences = [" ".join(rng.choice(words, 9)).capitalize() + "." for _ in range(8)]
        (folder / f"{number}.txt").write_text(" ".join(sentences))
    return folder


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fails(result: tuple[int, str, str], code: int, *words: str) -> None:
    """The exit code, and one line of error that says these words."""
    got, out, err = result
    assert got == code, err
    lines = [line for line in (out + err).splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert word in lines[0]
