"""With `init`, [model] is the checkpoint's: filled in, agreed with, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_models import TEXTS, write_model

from sip_engine.cli import app
from sip_engine.config.parse import parse_config
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.huggingface.importing import import_model
from sip_engine.policy.checkpoint import read_state
from sip_engine.policy.inherit import with_model_of_init
from sip_engine.utils.errors import ConfigError


@pytest.fixture(scope="module")
def checkpoint(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inherit")
    write_model(folder / "source", "qwen3 yarn")
    Tokenizer.train(TEXTS, 310, folder / "source" / "tokenizer.model")
    return import_model(folder / "source", folder / "checkpoint")


def test_the_model_comes_with_the_checkpoint(checkpoint: Path) -> None:
    data = {"path": "d.txt", "suffix_tokens": 8, "max_prefix_tokens": 16, "min_prefix_tokens": 4}
    values = {"init": str(checkpoint), "data": data}
    assert (
        parse_config(with_model_of_init(values, "run.toml"), "run.toml").model == read_state(checkpoint).model
    )
    own = {**values, "model": {"num_layers": 2, "precision": "fp32"}}  # agrees, and says what is the run's
    found = parse_config(with_model_of_init(own, "run.toml"), "run.toml").model
    assert found == read_state(checkpoint).model.model_copy(update={"precision": "fp32"})


def test_what_does_not_agree_is_one_line(checkpoint: Path) -> None:
    values = {"init": str(checkpoint), "model": {"num_layers": 3, "qk_norm": False, "hidden_size": 32}}
    with pytest.raises(ConfigError) as error:
        with_model_of_init(values, "run.toml")
    said = str(error.value)
    assert said.startswith(
        "run.toml: model.num_layers = 3, there 2; model.qk_norm = False, there True: the model is"
    )
    assert "leave these keys out" in said and "\n" not in said and "hidden_size" not in said


def test_nothing_is_filled_in_without_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    plain = {"model": {"num_layers": 3}}
    assert with_model_of_init(plain, "run.toml") == plain
    gone = {"init": str(tmp_path / "gone"), "out": str(tmp_path), **plain}
    assert with_model_of_init(gone, "run.toml") == gone, "that it is missing is said where it is opened"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000004").symlink_to(checkpoint)
    found = with_model_of_init({**gone, "model": {}}, "run.toml")  # a run that goes on
    assert found["model"]["num_layers"] == 2


def test_the_command_line_fills_it_in(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'init = "{checkpoint}"\n[data]\npath = "d.txt"\nsuffix_tokens = 8\n'
        "max_prefix_tokens = 16\nmin_prefix_tokens = 4\n"
    )
    app(["train", str(config), "--dry-run"], standalone_mode=False)
    assert '"rope_scaling": "yarn"' in capsys.readouterr().out
