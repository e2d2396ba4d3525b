"""A summary of `sip real` as CSV: every figure of every arm, and one line for what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import real
from benchmarks.record import read_csv


def _estimate(value: float) -> dict[str, float | int | str]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 32, "method": "bootstrap"}


SUMMARY = {
    "minutes": 10,
    "wall_seconds": 700.4,
    "cpu_seconds": 1300.0,
    "experiments": {
        "scratch": {
            "figures": {
                "win_rate": {
                    "base": _estimate(0.5),
                    "standard": _estimate(0.45),
                    "self_improving": _estimate(0.65),
                    "by_seed": {"standard": [0.45], "self_improving": [0.65]},
                    "self_improving_less_standard": _estimate(0.2),
                    "against_standard": "better",
                },
                "distinct_3": {
                    "base": 0.2,
                    "standard": 0.3,
                    "self_improving": 0.4,
                    "by_seed": {"standard": [0.3], "self_improving": [0.4]},
                    "self_improving_less_standard": 0.1,
                    "against_standard": "better",
                },
            }
        }
    },
}


def test_every_arm_of_every_figure(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert real.main(["--run", str(tmp_path), "--out", str(tmp_path / "real.csv")]) == 0
    rows = read_csv(tmp_path / "real.csv")
    found = {(row["figure"], row["arm"]): row for row in rows}
    assert len(rows) == len(found) == 8
    assert [found["win_rate", arm]["value"] for arm in ("base", "standard", "self_improving", "gain")] == [
        0.5, 0.45, 0.65, 0.2,
    ]  # fmt: skip
    assert found["win_rate", "gain"]["low"] == pytest.approx(0.1)
    assert found["distinct_3", "gain"]["value"] == 0.1 and found["distinct_3", "gain"]["low"] == ""
    assert found["win_rate", "gain"]["against_standard"] == "better"
    assert {row["wall_s"] for row in rows} == {700} and all(row["date"] and row["command"] for row in rows)


def test_what_is_no_summary_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert real.main(["--run", str(tmp_path), "--out", str(tmp_path / "real.csv")]) == 3
    (tmp_path / "summary.json").write_text('{"experiments": {"scratch": {}}}')
    assert real.main(["--run", str(tmp_path), "--out", str(tmp_path / "real.csv")]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert not (tmp_path / "real.csv").exists()
