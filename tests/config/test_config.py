"""Settings: every example parses, unknown keys get a suggestion, conflicts name the rule and the remedy."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sip_engine.config import section
from sip_engine.config.judge import LocalModelConfig
from sip_engine.config.parse import describe_settings, parse_config, read_toml
from sip_engine.config.schema import RunConfig
from sip_engine.utils.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


PLANS = set((CONFIGS / "reproduction").glob("*.toml"))  # see test_reproduction_plan.py
PARTS = {CONFIGS / "world" / "model.toml"}  # no run by itself


@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.rglob("*.toml")) - PLANS - PARTS), ids=lambda p: str(p.relative_to(CONFIGS))
)
def test_every_example_parses_and_survives_a_round_trip(path: Path) -> None:
    values = read_toml(path)
    if "world" not in values:
        values.setdefault("data", {})["path"] = "somewhere"
    if path.parent.name == "real" and "task" in values:  # `sip real` writes its prompts first
        values["data"]["eval_path"] = "elsewhere"
    if path.parent.name == "real" and "judge" in values:  # `sip real` fills in the judge that it has made
        values.setdefault("judge", {}).setdefault("local", {})["checkpoint"] = "somewhere"
    cfg = parse_config(values, str(path))
    assert RunConfig.model_validate_json(cfg.model_dump_json()) == cfg


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, r"unknown key 'stepz'; did you mean 'steps'\?"),
        ({"objective": {"betta": 0.1}}, r"unknown key 'objective.betta'; did you mean 'beta'\?"),
        ({"candidates": [{"rolouts": 2}]}, r"unknown key 'candidates.0.rolouts'; did you mean 'rollouts'\?"),
        (
            {"judge": {"weights": {"qualty": 1}}},
            r"unknown key 'judge.weights.qualty'; did you mean 'quality'",
        ),
        ({"world": {"zzz": 1}}, "unknown key 'world.zzz'; known: seed, split"),
        ({"steps": 0}, "steps: Input should be greater than 0"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
        ({"model": {"num_heads": 3}}, "hidden_size=128 must be a multiple of num_heads=3"),
        ({"model": {"num_kv_heads": 3}}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"model": {"hidden_size": 12, "num_heads": 4}}, "must be even"),
        ({"model": {"max_context": 512}}, "exceed model.max_context=512"),
        ({"data": {"min_prefix_tokens": 9000}}, "min_prefix_tokens=9000 is above max_prefix_tokens"),
        ({"data": {"path": "x"}, "world": {}}, r"both data.path and \[world\] are set"),
        ({"judge": {"backend": "world"}}, r'judge.backend = "world" knows the synthetic world only'),
        ({"candidates": [{"rewrite": True}]}, "set rewriter.backend"),
        ({"candidates": [{"rollouts": 0}]}, "dpo needs 2 or more candidates a prefix"),
        (
            {"candidates": [{"original": False, "rollouts": 0}], "objective": {"kind": "rf_nll"}},
            "rf_nll needs 1 or more",
        ),
        ({"candidates": []}, "from_step must rise from 0"),
        ({"candidates": [{"from_step": 5}]}, r"from_step must rise from 0, got \[5\]"),
        ({"objective": {"kind": "sft_rewrite"}}, "sft_rewrite trains on rewrites"),
        ({"objective": {"kind": "sft_rollout"}, "candidates": [{"rollouts": 0}]}, "trains on a rollout"),
        ({"judge": {"weights": {"quality": 0, "safety": 0, "factuality": 0}}}, "all reward weights are 0"),
        ({"parallel": {"tensor": 3}}, "parallel.tensor=3 does not divide model.num_heads=4"),
        ({"parallel": {"pipeline": 3}}, "parallel.pipeline=3 does not divide model.num_layers=4"),
        ({"parallel": {"sequence": True}}, "parallel.sequence needs parallel.tensor"),
        ({"sampler": {"batch_invariant": True, "kv_dtype": "fp8"}}, "FP8 scales depend on the batch"),
        ({"reference": {"ema": 0.9, "refresh_every": 5}}, "choose how the reference follows"),
        ({"sampler": {"top_p": 0}}, "sampler.top_p: Input should be greater than 0"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(values, "my.toml")
    assert str(caught.value).startswith("my.toml: ") and "\n" not in str(caught.value)


def test_the_stage_in_force_changes_with_the_step() -> None:
    stages = [{"rollouts": 1}, {"from_step": 10, "rollouts": 2}]
    cfg = parse_config({"candidates": stages}, "test")
    assert [cfg.candidates_at(step).rollouts for step in (0, 9, 10, 500)] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such config file"),
        (b"steps = [", "not a readable TOML file"),
        (b"\xff\xfe", "not a readable"),
        (b"steps = " + b"[" * 50_000, "not a readable TOML file: nested too deeply"),
        (b"a" + b".a" * 50_000 + b" = 1", "not a readable TOML file: nested too deeply"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "broken.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}: {message}"):
        read_toml(path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": True}, "seed: true is no number"),
        ({"optimizer": {"lr": False}}, r"optimizer\.lr: false is no number"),
        ({"judge": {"waves": True}}, r"judge\.waves: true is no number"),
        ({"steps": 99999999999999999999}, "steps: Input should be less than 100000000"),
        ({"batch_size": 2**31}, "batch_size: Input should be less than 2147483648"),
        ({"model": {"num_layers": 10**9}}, r"model\.num_layers: Input should be less than or equal to 10000"),
        ({"optimizer": {"lr": 1e38}}, r"optimizer\.lr: Input should be less than or equal to 1"),
    ],
)
def test_numbers_that_are_none_or_out_of_all_range(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(values, "test")


def test_true_stays_true() -> None:
    assert parse_config({"parallel": {"sequence": False, "overlap": True}}, "test").parallel.overlap is True


def test_every_setting_has_a_meaning() -> None:
    lines = describe_settings().splitlines()
    for setting, meaning in pairwise(lines):
        if " = " in setting and not setting.startswith("#") and not setting.startswith("    "):
            assert meaning.startswith("    ") and meaning.strip() not in ("", "None"), setting
    assert any(line.startswith("judge.weights.quality = 1.0") for line in lines)


def test_a_value_by_its_name_of_the_last_version_works_with_one_notice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr("sip_engine.utils.progress.console.print", lambda text, **_: said.append(text))
    section._say_once.cache_clear()
    for _ in range(2):
        assert LocalModelConfig.model_validate({"method": "notes"}).method == "sentence_labels"
    assert said == ['"notes" is called "sentence_labels" now; the old name works in this version only']
