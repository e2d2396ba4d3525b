"""Trackers: what each of them is told, restarts, and that none of them stops a run."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import small_run
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sip_engine.config.backends import TRACKERS
from sip_engine.config.schema import RunConfig
from sip_engine.monitoring.records import METRICS, Records, read_records
from sip_engine.monitoring.trackers.base import Trackers, register_tracker

VALUES = {"loss": 0.5, "reward/rollout": 1.25, "eval/heldout_loss/low": 2.0}


def told(cfg: RunConfig, from_step: int = 0, *steps: int) -> None:
    trackers = Trackers(cfg, from_step)
    for step in steps:
        trackers.log(step, {name: value + step for name, value in VALUES.items()})
    trackers.close()


def test_a_prometheus_file_holds_the_newest_figures(tmp_path: Path) -> None:
    path = tmp_path / "node" / "sip.prom"
    told(small_run(out=tmp_path, tracking={"use": ["prometheus"], "prometheus": {"path": path}}), 0, 1, 2)
    found = {
        s.name: (s.labels, s.value)
        for f in text_string_to_metric_families(path.read_text())
        for s in f.samples
    }
    labels = {"run": str(tmp_path)}
    assert found["sip_reward_rollout"] == (labels, 3.25) and found["sip_eval_heldout_loss_low"] == (
        labels,
        4.0,
    )
    assert found["sip_step"] == (labels, 2.0)
    assert [p.name for p in path.parent.iterdir()] == ["sip.prom"]  # replaced whole, nothing beside it


def test_tensorboard_takes_steps_back_on_a_restart(tmp_path: Path) -> None:
    cfg = small_run(out=tmp_path)  # the default tracker
    told(cfg, 0, 1, 2, 3)
    told(cfg, 3, 3)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.5), (2, 2.5), (3, 3.5)]


def test_wandb_offline_is_one_run_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    cfg = small_run(out=tmp_path, tracking={"use": ["wandb"], "wandb": {"mode": "offline", "project": "p"}})
    told(cfg, 0, 1, 2)
    told(cfg, 3, 3)
    wandb.teardown()  # its own process has written all
    starts = [_offline(path) for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))]
    assert len(starts) == 2
    (first, rows), (second, later) = starts
    assert (
        first == second
        and first["project"] == "p"
        and first["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    )
    assert [float(row["loss"]) for row in rows] == [1.5, 2.5] and [row["step"] for row in rows] == ["1", "2"]
    assert [float(row["reward/rollout"]) for row in later] == [4.25]


def _offline(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Project and id of a file of wandb's, and its rows."""
    from wandb.proto import wandb_internal_pb2

    run, rows = {}, []
    for data in _logged(path.read_bytes()):
        record: Any = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            run = {"project": record.run.project, "id": record.run.run_id}
        if record.WhichOneof("record_type") == "history":
            names = [("/".join(item.nested_key) or item.key, item.value_json) for item in record.history.item]
            rows.append(dict(names))
    return run, rows


def _logged(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: 7 bytes of header, blocks of 32 KiB, parts numbered by kind."""
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole, or its last part
            yield record
            record = b""


@pytest.mark.parametrize("fault", ["open", "log", "close"])
def test_a_tracker_that_fails_is_said_once_and_gone_on_without(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bad:
        logged = 0

        def __init__(self) -> None:
            self.fail("open")

        def fail(self, where: str) -> None:
            if where == fault:
                raise RuntimeError(f"no {where}\ntoday")

        def log(self, step: int, values: Mapping[str, float]) -> None:
            Bad.logged += 1
            self.fail("log")

        def close(self) -> None:
            self.fail("close")

    @register_tracker("bad")
    def _open(cfg: RunConfig, from_step: int) -> Bad:
        return Bad()

    try:
        cfg = small_run(out=tmp_path, tracking={"use": ["bad", "prometheus"]})
        records = Records(tmp_path, from_step=0, enabled=True, cfg=cfg)
        for step in (1, 2, 3):
            records.metrics(step, VALUES)
        records.close()
    finally:
        TRACKERS.forget("bad")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"tracker bad: no {fault} today; going on without it"
    assert Bad.logged == {"open": 0, "log": 1, "close": 3}[fault]
    assert len(list(read_records(tmp_path / METRICS))) == 3
    assert "sip_step" in (tmp_path / "metrics.prom").read_text()


def test_an_unknown_tracker_is_one_line() -> None:
    with pytest.raises(ValueError, match="did you mean 'wandb'"):
        small_run(tracking={"use": ["wandbb"]})
