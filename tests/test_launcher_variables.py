"""What a launcher leaves in the environment: commands of one process work alone, or name the variables in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from sip_engine.distributed import mesh
from sip_engine.utils.errors import ConfigError

INSPECT = ["data", "inspect", "t.toml", "--data.path", "book.txt"]


def sip(folder: Path, arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "sip_engine", *arguments],
        cwd=folder,
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text("The river walks over the old green bridge at night. " * 40)
    (tmp_path / "t.toml").write_text(
        "[data]\nvocab_size = 290\nsuffix_tokens = 8\nmax_prefix_tokens = 24\nmin_prefix_tokens = 4\n"
    )
    return tmp_path


def test_a_lone_rank_is_ignored(folder: Path) -> None:
    done = sip(folder, INSPECT, RANK="0", WORLD_SIZE="1")
    assert done.returncode == 0, done.stderr


def test_several_processes_are_refused_in_one_line(folder: Path) -> None:
    foreign = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    done = sip(folder, INSPECT, **foreign, MASTER_ADDR="127.0.0.1", MASTER_PORT="29512")
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: RANK=3, WORLD_SIZE=4 in the environment"), (
        done.stderr
    )
    assert "unset RANK WORLD_SIZE" in said[0]


def test_an_error_is_said_whatever_local_rank_was_left_behind(folder: Path) -> None:
    done = sip(folder, ["data", "inspect", "none.toml"], LOCAL_RANK="1")
    assert done.returncode == 2 and done.stderr.startswith("error: none.toml"), done.stderr


def test_a_machine_without_any_network_interface_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **named: object) -> None:
        raise RuntimeError("[enforce fail] ifa != nullptr. Unable to find interface for: [127.0.0.1]")

    monkeypatch.setattr(mesh.dist, "init_process_group", refuse)
    with pytest.raises(ConfigError, match="ip link set lo up"):
        mesh._join_alone(timedelta(seconds=1))
