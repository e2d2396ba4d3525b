"""Full disks, processes that are started wrongly, and what a crash leaves: one line, nothing lost or leaked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import CONFIG, INJECT, STEPS, metrics, saved, start, train, wait

from sip_engine.monitoring.records import METRICS, Records
from sip_engine.utils.crash import write_crash
from sip_engine.utils.errors import DataError


def free_port() -> int:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        return port.getsockname()[1]


def test_a_full_disk_under_the_records_is_one_line(tmp_path: Path) -> None:
    records = Records(tmp_path, from_step=0, enabled=True)
    records.metrics(1, {"loss": 1.0})
    records._files[METRICS].close()
    records._files[METRICS] = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(
        DataError, match=r"cannot be written \(No space left on device\); free space"
    ) as error:
        records.metrics(2, {"loss": 1.0})
    assert "\n" not in str(error.value)
    records.close()
    assert (tmp_path / METRICS).read_text().count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "at", "code"),
    [
        (1, "data", 3),
        pytest.param(2, "data", 3, marks=pytest.mark.faults),
        pytest.param(1, "save", 4, marks=pytest.mark.faults),
        pytest.param(2, "save", 4, marks=pytest.mark.faults),
    ],
)
def test_a_run_on_a_full_disk_leaves_the_last_checkpoint(
    ranks: int, at: str, code: int, tmp_path: Path
) -> None:
    step = 2 if at == "data" else 3  # a save belongs to the step that comes next
    fault = f"at={at} step={step} rank=0 do=full"
    keep = ("--checkpoint.every", 1)
    # At a port: a store in a file could not grow either.
    ended = wait(start(tmp_path, *keep, "--faults.timeout_s", 40, ranks=ranks, fault=fault, port=free_port()))
    assert [one.code for one in ended] == [code] * ranks, ended
    assert saved(tmp_path) == [1] and "Traceback" not in ended[0].said + ended[-1].said
    for one in train(tmp_path, *keep, ranks=ranks):
        assert one.code == 0, one.said
    assert [row["step"] for row in metrics(tmp_path) if "loss" in row] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR"),
        pytest.param(
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT", marks=pytest.mark.faults
        ),
        pytest.param(
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "taken"},
            "did not find each other",
            marks=pytest.mark.faults,
        ),
        pytest.param(
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "free"},
            "did not find each other",
            marks=pytest.mark.faults,
        ),
    ],
)
def test_processes_that_do_not_meet_are_one_line(
    environment: dict[str, str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        number = port.getsockname()[1]
        if environment.get("MASTER_PORT") == "taken":
            port.listen()
        else:
            port.close()
        environment = environment | ({"MASTER_PORT": str(number)} if "MASTER_PORT" in environment else {})
        done = subprocess.run(
            [sys.executable, "-P", str(INJECT), "train", "run.toml", "--faults.timeout_s", "3"],
            cwd=tmp_path,
            env=os.environ | {"RANK": "0", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_crash_bundle_says_what_there_was_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_ACCESS", "sk-4711-secret")
    monkeypatch.setenv("HF_TOKEN", "hf_another_one")
    (tmp_path / "config.json").write_text('{"extra": "sk-4711-secret"}')
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(100)))
    try:
        raise ValueError("refused hf_another_one and sk-4711-secret")
    except ValueError as error:
        folder = write_crash(tmp_path, 0, str(error), error=error, key_names=["JUDGE_ACCESS"])
    assert folder is not None and folder == tmp_path / "crash"
    names = {path.name: path.read_text() for path in folder.iterdir()}
    assert names.keys() == {"rank_0.txt", "versions.json", "config.json", "metrics.jsonl"}
    assert not any("sk-4711-secret" in text or "hf_another_one" in text for text in names.values())
    assert "refused *** and ***" in names["rank_0.txt"] and "(most recent call first)" in names["rank_0.txt"]
    assert names["metrics.jsonl"].splitlines()[-1] == '{"step": 99}' and '"torch"' in names["versions.json"]
    (tmp_path / "file").write_text("")
    assert write_crash(tmp_path / "file", 0, "cannot be written") is None
