"""The acceptance run rehearsed on the emulated device: items end, resume, fail alone, and make one table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import items, main, runner
from benchmarks.gpu.items import ITEMS, Item
from benchmarks.gpu.runner import Options, run
from benchmarks.gpu.tune import tune
from benchmarks.record import ROOT
from sip_engine.kernels._tiles import TABLE, TileKey, read_tiles
from sip_engine.utils.errors import ConfigError


def ends(out: Path) -> dict[int, dict]:
    return {end["item"]: end for end in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


def test_an_item_that_fails_or_hangs_costs_itself_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    """Then the same command does only what is missing."""
    broken = Item(2, "breaks", "kernels:warm_up", 30)
    hangs = Item(3, "hangs", "kernels:exactness", 75)
    monkeypatch.setattr(runner, "ITEMS", (ITEMS[0], hangs, broken))
    monkeypatch.setattr(
        runner, "_with_deadlines", lambda o, left, b: ((i, 0.2 if i is hangs else 200.0) for i in left)
    )
    # A worker does the tree's item of that number, which needs the table of tiles, as item 1 does not.
    monkeypatch.setenv("SIP_TILES", str(tmp_path / "no_tiles.csv"))
    options = Options(tmp_path / "out", rehearse=True)
    assert run(options) == 1
    found = ends(options.out)
    assert [found[n]["status"] for n in (1, 2, 3)] == ["done", "failed", "timeout"]
    assert "the table of tiles cannot be read" in found[2]["reason"]
    table = (options.out / "table.md").read_text()
    assert "**A rehearsal**" in table and "| rehearsed |" in table
    assert "| 3 | **hangs** | timeout in " in table
    assert "2 of 3 items failed: 3, 2" in capsys.readouterr().out
    monkeypatch.delenv("SIP_TILES")
    monkeypatch.setattr(runner, "ITEMS", (ITEMS[0], broken))
    first = found[1]
    assert run(options) == 0
    assert ends(options.out)[1] == first and ends(options.out)[2]["status"] == "done"


@pytest.mark.slow
def test_every_item_is_rehearsed(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks",
        "gpu",
        "--rehearse",
        "--out",
        str(tmp_path),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = ends(tmp_path)
    assert [found[item.number]["status"] for item in items.ITEMS] == ["done"] * 13
    assert all(end["kind"] == "rehearsal" for end in found.values())


@pytest.mark.slow
def test_tuning_is_rehearsed_and_leaves_the_tree_alone(tmp_path: Path) -> None:
    before = TABLE.read_text()
    assert tune(tmp_path, 5.0, rehearse=True) == 0
    assert TABLE.read_text() == before
    old, new = ({key: tile for key, tile, _ in read_tiles(path)} for path in (TABLE, tmp_path / "tiles.csv"))
    assert old.keys() == new.keys()
    assert {key for key in old if old[key] != new[key]} <= {TileKey("decode_suffix", 64, 4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no CUDA device: --rehearse"),
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--minutes", "nan"], "--minutes nan: must be above 0"),
        (["--minutes", "-1"], "--minutes -1: must be above 0"),
        (["--minutes", "1e9"], "--minutes 1e+09: must be above 0 and at most a day"),
        (["--items", "3", "14"], "--items 14: there are 1 to 13"),
        (["--tune", "--items", "3"], "--tune runs no items"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str, capsys) -> None:
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["--rehearse"], ["--rehearse", "--tune"]])
def test_a_folder_that_cannot_be_had_is_one_line(tmp_path: Path, command: list[str], capsys) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        assert main(["--out", str(out), *command]) != 0
        error = capsys.readouterr().err
        assert error.startswith(f"error: {out}: ") and error.count("\n") == 1 and file.read_text() == "mine"
    with runner.own_folder(tmp_path / "out"):
        assert main(["--out", str(tmp_path / "out"), *command]) == 2
        assert "another run is at work there" in capsys.readouterr().err


def test_what_is_cut_off_or_of_an_older_version_is_done_again(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(runner, "ITEMS", ITEMS[:2])
    ran: list[int] = []

    def end_of(item: Item, options: Options, seconds: float) -> dict:
        ran.append(item.number)
        whole = {"title": item.title, "seconds": 1.0, "commit": "c", "reason": "", "figures": []}
        return {"item": item.number, "kind": "rehearsal", "status": "done", **whole}

    monkeypatch.setattr(runner, "_run_item", end_of)
    options = Options(tmp_path, rehearse=True)
    assert run(options) == 0 and ran == [1, 2]
    results = tmp_path / "results.jsonl"
    whole = results.read_text()
    results.write_text(whole[:-20])
    assert run(options) == 0 and ran == [1, 2, 2] and results.read_text() == whole
    assert "results.jsonl: line 2 is cut off" in capsys.readouterr().out
    results.write_text(whole.replace('"commit": "c", ', "", 1))
    assert run(options) == 0 and ran == [1, 2, 2, 1] and results.read_text() == whole


def test_figures_of_an_item_that_was_ended_within_a_line(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    path.write_text('{"name": "a"}\n{"na')
    assert runner.json_lines(path) == ([{"name": "a"}], [2])
    assert runner.json_lines(tmp_path / "none") == ([], [])


def test_results_of_another_kind_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"item": 1, "kind": "measured", "status": "done"}\n')
    with pytest.raises(ConfigError, match="another kind"):
        run(Options(tmp_path, rehearse=True))
    for text in ("[1]\n", "free text\n", "\x00\n"):
        (tmp_path / "results.jsonl").write_text(text)
        with pytest.raises(ConfigError, match="not results of this benchmark"):
            run(Options(tmp_path, rehearse=True))
