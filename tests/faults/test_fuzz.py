"""Odd files: whatever a checkpoint, records or a config hold, a command does its work or says in one line why not.

2,000 mutations of a file (300 where another command reads it again) in `make test-faults`, the first of them in
`make test`. Each is a function of its number.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import Sip
from markupsafe import Markup
from mutate import Mutation, mutate_bytes, mutate_json, mutate_jsonl, mutate_toml, of_text
from world_runs import run_config

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.checkpoint_files import MANIFEST, write_manifest
from sip_engine.train import train

MANY, FEW = "many", "few"
DRAWN = 5
"""Reports beyond these are made without their figures, of which only the drawing takes long."""
CHECKPOINT = "run/checkpoints/step_00000001"


@dataclass(frozen=True)
class Target:
    """A file of a run, how it is mutated, the command that reads it, and the exit codes that may come of it."""

    file: str
    mutation: Mutation
    command: str
    codes: frozenset[int]
    many: int = 2000
    few: int = 100


TARGETS = {
    "state": Target(
        f"{CHECKPOINT}/state.json", of_text(mutate_json), "export run --out e", frozenset({0, 4})
    ),
    "manifest": Target(
        f"{CHECKPOINT}/manifest.json", of_text(mutate_json), "export run --out e", frozenset({0, 4})
    ),
    "index": Target(f"{CHECKPOINT}/sharded/.metadata", mutate_bytes, "export run --out e", frozenset({0, 4})),
    "common": Target(
        f"{CHECKPOINT}/sharded/common.pt", mutate_bytes, "train run.toml", frozenset({0, 4}), 300, 15
    ),
    "resumed state": Target(
        f"{CHECKPOINT}/state.json", of_text(mutate_json), "train run.toml", frozenset({0, 2, 4}), 300, 15
    ),
    "metrics": Target("run/metrics.jsonl", of_text(mutate_jsonl), "report run", frozenset({0, 3})),
    "pools": Target("run/pools.jsonl", of_text(mutate_jsonl), "report run", frozenset({0, 3})),
    "settings": Target("run/config.json", of_text(mutate_json), "report run", frozenset({0, 3}), 300, 15),
    "resumed metrics": Target(
        "run/metrics.jsonl", of_text(mutate_jsonl), "train run.toml", frozenset({0, 3}), 300, 15
    ),
    "resumed pools": Target(
        "run/pools.jsonl", of_text(mutate_jsonl), "train run.toml", frozenset({0, 3}), 300, 15
    ),
    "baseline": Target(
        "run/baseline.jsonl", of_text(mutate_jsonl), "train run.toml", frozenset({0, 2, 3}), 300, 15
    ),
    "config": Target("every.toml", of_text(mutate_toml), "train every.toml --dry-run", frozenset({0, 2})),
}


def toml_of(values: object, name: str = "") -> list[str]:
    """Settings as lines of TOML with dotted keys; what is unset is left out."""
    if isinstance(values, dict) and (values or not name):
        return [line for key, value in values.items() for line in toml_of(value, f"{name}.{key}".lstrip("."))]
    return [] if values is None else [f"{name} = {inline(values)}"]


def inline(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {inline(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(inline, value))}]"
    return json.dumps(value)


@pytest.fixture(scope="module")
def made(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of two steps, its config, and a config of every setting."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = run_config(
        folder, steps=1, batch_size=2, candidates=[{"rollouts": 2}], rewriter={"backend": "none"}
    )
    values = cfg.model_dump(mode="json") | {"out": "run"}
    (folder / "run.toml").write_text("\n".join(toml_of(values)))
    (folder / "every.toml").write_text("\n".join(toml_of(RunConfig().model_dump(mode="json"))))
    train(cfg, mesh)
    return folder


def fault(sip: Sip, target: Target) -> str | None:
    """What is wrong with how the command ends; None where all is well."""
    try:
        code, out, err = sip(*target.command.split())
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {frame.filename}:{frame.lineno}"
    lines = [line for line in (out + err).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if code not in target.codes:
        return f"code {code}: {lines[-1:]}"
    if code and (len(errors) != 1 or lines[-1] != errors[0]):
        return f"code {code} with {len(errors)} lines of error: {lines[-3:]}"
    return f"code 0 with {errors}" if not code and errors else None


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=[pytest.mark.faults, pytest.mark.slow])])
@pytest.mark.parametrize("name", TARGETS)
def test_odd_files_are_one_line(
    sip: Sip,
    made: Path,
    tmp_path: Path,
    no_waiting: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    count: int,
) -> None:
    target, faults = TARGETS[name], dict[str, list[int]]()
    content = (made / target.file).read_bytes()
    for number in range(target.few if count == FEW else target.many):
        if number == DRAWN:
            for drawing in ("draw_lines", "draw_stack"):
                monkeypatch.setattr(f"sip_engine.report.plots.{drawing}", lambda *_, **__: Markup(""))
        shutil.rmtree(tmp_path)
        shutil.copytree(made, tmp_path)
        (tmp_path / target.file).write_bytes(target.mutation(content, random.Random(number)))
        if target.file.startswith(CHECKPOINT) and not target.file.endswith(MANIFEST):
            write_manifest(tmp_path / CHECKPOINT)
        os.chdir(tmp_path)
        signal.alarm(180)
        found = fault(sip, target)
        if found:
            faults.setdefault(found, []).append(number)
    shutil.rmtree(tmp_path)
    shutil.copytree(made, tmp_path)
    os.chdir(tmp_path)
    assert sip(*target.command.split())[0] == 0, "the file as it was is not read either"
    assert not faults, "\n".join(f"{len(numbers)} x {one}: {numbers[:5]}" for one, numbers in faults.items())
