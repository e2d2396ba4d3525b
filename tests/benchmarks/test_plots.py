"""Benchmarks draw the figures that are in the tree from their CSV files alone, without measuring."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest

from benchmarks.record import RESULTS, read_csv


@pytest.mark.parametrize("name", ["sampler_cpu_64_sequences", "update_cpu", "judge_schedules"])
def test_a_picture_in_the_tree_is_its_csv_drawn(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.csv"
    shutil.copy(RESULTS / path.name, path)
    benchmark = "judge_schedules" if name == "judge_schedules" else name.split("_")[0]
    importlib.import_module(f"benchmarks.{benchmark}").main(["--plot", str(path)])
    assert path.with_suffix(".svg").read_text() == (RESULTS / f"{name}.svg").read_text()


def test_numbers_are_read_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b,c,d\n1,2.5,,x\n")
    assert read_csv(path) == [{"a": 1, "b": 2.5, "c": "", "d": "x"}]
