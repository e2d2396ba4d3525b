"""Objectives from outside the package: the one of CONTRIBUTING by a call, another by an entry point, in real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_run
from llama import llama_logprobs, llama_of
from made_choices import VOCAB, choices
from world_runs import metrics, pools, run_config

from sip_engine.config.objective import OBJECTIVES, recorded_facts
from sip_engine.config.schema import ObjectiveConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.train import train
from sip_engine.utils.errors import ConfigError

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def ipo(tmp_path: Path) -> Iterator[type]:
    """The walk-through's file, run as it stands there."""
    _, _, section = GUIDE.read_text().partition("## Adding an objective")
    code = section.partition("```python\n")[2].partition("```")[0]
    file = tmp_path / "ipo.py"  # pydantic reads the descriptions of settings there
    file.write_text(code)
    names: dict[str, Any] = {"__name__": "walk_through"}
    exec(compile(code, str(file), "exec"), names)
    yield names["IPO"]
    OBJECTIVES.forget("ipo")


@pytest.mark.parametrize("micro_batch_tokens", [4096, 25])
def test_ipo_equals_plain_torch(mesh: Mesh, ipo: type, micro_batch_tokens: int) -> None:
    """Two updates, the second away from the reference."""
    cfg = small_run(
        parallel={"micro_batch_tokens": micro_batch_tokens}, optimizer={"lr": 1e-2, "warmup_steps": 0}
    )
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    frozen = llama_of(policy.model, VOCAB)
    objective = open_objective(ObjectiveConfig(kind="ipo", options={"tau": 0.2}))
    assert isinstance(objective, ipo)
    for step in range(2):
        llama, batch, losses = llama_of(policy.model, VOCAB), choices(step, 4), []
        with torch.no_grad():
            for choice in batch:
                prefix = choice.sample.prefix_ids.tolist()
                chosen, rejected = (
                    (
                        llama_logprobs(llama, prefix, ids).sum() - llama_logprobs(frozen, prefix, ids).sum()
                    ).item()
                    for ids in (candidate.ids.tolist() for candidate in choice.trained())
                )
                losses.append((chosen - rejected - 1 / 0.4) ** 2)
        stats = update(policy, reference, [objective.row_of_choice(c) for c in batch], objective)
        assert stats.loss == pytest.approx(sum(losses) / 4, abs=1e-4)
        gains = objective.metrics(stats.sums)
        assert set(gains) > {"ipo/chosen_gain", "ipo/implicit_accuracy"}
    assert stats.grad_norm > 0


def test_a_registered_objective_trains(mesh: Mesh, tmp_path: Path, ipo: type) -> None:
    objective = {"kind": "ipo", "options": {"tau": 0.5}}
    train(run_config(tmp_path, steps=2, objective=objective, eval={"generate": False}), mesh)
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    assert rows[0]["loss"] == pytest.approx(1.0, abs=1e-4), (
        "(0 - 1 / (2 tau))², the policy being its reference"
    )
    assert rows[0]["ipo/implicit_margin"] == pytest.approx(0.0, abs=1e-4)
    for pool in pools(tmp_path):  # judged as its base class wants it: all pairs of the distinct texts
        distinct = len({candidate["text"] for candidate in pool["candidates"]})
        assert len(pool["pairs"]) == distinct * (distinct - 1) // 2 > 0
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["objective"]
    facts = recorded_facts(recorded)
    assert facts is not None and facts.loss_unit == "squared nats a pair"


ORIGINALS = '''
from sip_engine.objectives.base import Objective, first_of
from sip_engine.types import Choice, Kind


class LaterTokens(Objective):
    """The document's own suffix, without the loss of its first token."""

    needs_kinds = (Kind.ORIGINAL,)

    def choose(self, sample, pool, verdict, *, seed):
        assert verdict is None
        return Choice(sample, tuple(pool), first_of(pool, Kind.ORIGINAL))

    def row_of_choice(self, choice):
        from dataclasses import replace

        row = super().row_of_choice(choice)
        weights = [1.0] * len(row.suffixes[0])
        weights[0] = 0.0
        return replace(row, weights=(weights,))

    def metrics(self, logged):
        return {"later/known": 1.0}
'''


def test_an_installed_objective_trains(mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "later_tokens.py").write_text(ORIGINALS)
    info = tmp_path / "later_tokens-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: later-tokens\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sip_engine.objectives]\nlater = later_tokens:LaterTokens\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"later trains on originals: set candidates.original=true"):
        run_config(tmp_path, objective={"kind": "later"}, candidates=[{"original": False}])
    with pytest.raises(ConfigError, match=r'objective.options is set, but "later" has no options: remove it'):
        run_config(tmp_path, objective={"kind": "later", "options": {"tau": 1}})
    candidates = [{"original": True, "rollouts": 0}]
    run = {"steps": 2, "candidates": candidates, "eval": {"generate": False}}
    train(run_config(tmp_path, objective={"kind": "later"}, **run), mesh)
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    assert all(row["later/known"] == 1.0 and row["grad_norm"] > 0 for row in rows)
    train(run_config(tmp_path / "whole", objective={"kind": "rf_nll"}, **run), mesh)
    whole = next(row["loss"] for row in metrics(tmp_path / "whole") if "loss" in row)
    assert 0.8 * whole < rows[0]["loss"] < 0.95 * whole, "eleven of twelve tokens, over twelve"
    OBJECTIVES.forget("later")


def test_wrong_names_and_options_are_one_line(ipo: type) -> None:
    for objective, message in (
        (
            {"kind": "ip0"},
            r"objective.kind: unknown objective 'ip0'; known: dpo, rf_nll, .*, ipo; did you mean",
        ),
        ({"kind": "ipo", "options": {"tau": 0}}, r"objective.options.tau: Input should be greater than 0"),
        (
            {"kind": "ipo", "options": {"tou": 1}},
            r'options.tou: Extra inputs are not permitted; "ipo" knows tau',
        ),
        ({"kind": "dpo", "options": {"tau": 1}}, r'"dpo" has no options: remove it'),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            run_config(Path("."), objective=objective)
        assert "\n" not in str(caught.value)
    assert recorded_facts({"kind": "gone"}) is None and recorded_facts({}) is None


def test_something_else_under_a_name_is_refused() -> None:
    OBJECTIVES.register("number")(lambda cfg: 3)
    try:
        with pytest.raises(ConfigError, match=r"'number' is no sip_engine.objectives.base.Objective"):
            run_config(Path("."), objective={"kind": "number"})
    finally:
        OBJECTIVES.forget("number")


def test_settings_of_every_objective_are_checked_without_torch() -> None:
    code = """
import sys
from sip_engine.config.objective import OBJECTIVES, ObjectiveConfig
for name in OBJECTIVES.names():
    print(name, ObjectiveConfig(kind=name).facts.needs_judge)
assert not {"torch", "megatron", "triton"} & set(sys.modules), "heavy"
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["dpo True", "rf_nll True"]
