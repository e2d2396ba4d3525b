"""`extends`: a table over that of another file, to any depth; faults are one line that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sip_engine.config.parse import find_config, parse_config, read_toml
from sip_engine.experiments.reproduction.plan import load_plan
from sip_engine.utils.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def test_tables_are_merged_and_all_else_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "model.toml").write_text("[model]\nnum_layers = 2\nhidden_size = 64\n")
    (tmp_path / "shared" / "base.toml").write_text(
        'extends = "model.toml"\nsteps = 3\n[[candidates]]\nrollouts = 1\n[[candidates]]\nfrom_step = 2\n'
        "[optimizer]\nlr = 1e-3\neps = 1e-6\n"
    )
    path = tmp_path / "run.toml"
    path.write_text(
        'extends = "shared/base.toml"\n[model]\nnum_layers = 5\n[[candidates]]\nrollouts = 7\n'
        "[optimizer]\nlr = 1e-4\n"
    )
    values = read_toml(path)
    assert values == {
        "steps": 3,
        "model": {"num_layers": 5, "hidden_size": 64},
        "candidates": [{"rollouts": 7}],
        "optimizer": {"lr": 1e-4, "eps": 1e-6},
    }
    assert parse_config(values, "x").model.num_layers == 5


def test_a_table_of_a_file_may_extend_another_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("steps = 3\n[model]\nnum_layers = 2\n")
    (tmp_path / "plan.toml").write_text('[common]\nextends = "run.toml"\n[common.model]\nhidden_size = 96\n')
    assert read_toml(tmp_path / "plan.toml") == {
        "common": {"steps": 3, "model": {"num_layers": 2, "hidden_size": 96}}
    }


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            'extends = "two.toml"',
            'extends = "one.toml"',
            r"two\.toml: extends itself \(one.* -> two.* -> one",
        ),
        ('extends = "one.toml"', "", r"one\.toml: extends itself"),
        ('[model]\nextends = "../x/one.toml"', "", r"one\.toml: model\.extends itself"),
        ('extends = "none.toml"', "", r"none\.toml: no such config file \(.*one\.toml extends it\)"),
        ("extends = 3", "", r"one\.toml: extends: must be the name of another file"),
        ('[model]\nextends = ["a"]', "", r"one\.toml: model\.extends: must be the name"),
        ('extends = "two.toml"', "x = [", r"two\.toml: not a readable TOML file"),
        ('extends = "."', "", "not a readable TOML file"),
    ],
)
def test_a_bad_extension_is_one_line(tmp_path: Path, first: str, second: str, message: str) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "one.toml").write_text(first)
    (folder / "two.toml").write_text(second)
    with pytest.raises(ConfigError, match=message) as raised:
        read_toml(folder / "one.toml")
    assert "\n" not in str(raised.value)


def test_an_unknown_key_of_an_extended_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text("[model]\nnum_layer = 2\n")
    (tmp_path / "run.toml").write_text('extends = "model.toml"\n')
    with pytest.raises(ConfigError, match="did you mean 'num_layers'"):
        parse_config(read_toml(tmp_path / "run.toml"), "run.toml")


@pytest.mark.parametrize(
    ("old", "new"), [("reproduction", "small"), ("large", "large"), ("win_rate", "win_rate")]
)
def test_plans_are_found_under_their_old_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    path = find_config(CONFIGS / "world" / f"{old}.toml")
    assert path == CONFIGS / "reproduction" / f"{new}.toml" and path.is_file()
    assert f"reproduction/{new}.toml now" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "mine.toml").write_text(f'extends = "{CONFIGS}/world/{old}.toml"\n')
    assert load_plan(tmp_path / "mine.toml").rows == load_plan(path).rows
    assert find_config(path) == path and capsys.readouterr().err.count("now") == 1  # for mine.toml


def test_another_file_of_an_old_name_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    path = tmp_path / "world" / "large.toml"
    path.write_text("steps = 3")
    assert find_config(path) == path and read_toml(path) == {"steps": 3}
