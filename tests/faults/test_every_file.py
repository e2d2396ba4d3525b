"""Every kind of file of a run and its cache flipped, cut, deleted: the run goes on as it would have, or says why not.

A table: what becomes of it under the same command. "same": it ends with the records of a run whose files were whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Sip
from test_fuzz import toml_of
from world_runs import metrics, pools, run_config

from sip_engine.distributed.mesh import Mesh
from sip_engine.train import train

SAME = "same"
NEWEST = "run/checkpoints/step_00000002"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x04
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "delete": Path.unlink}

# What becomes of it when it is flipped or cut, and when it is deleted: SAME, or exit code and words.
Outcome = str | tuple[int, str]
FILES: dict[str, tuple[Outcome, Outcome]] = {
    f"{NEWEST}/manifest.json": (SAME, SAME),
    f"{NEWEST}/state.json": (SAME, SAME),
    f"{NEWEST}/tokenizer.model": (SAME, SAME),
    f"{NEWEST}/sharded/.metadata": (SAME, SAME),
    f"{NEWEST}/sharded/common.pt": (SAME, SAME),
    f"{NEWEST}/sharded/metadata.json": (SAME, SAME),
    f"{NEWEST}/sharded/__0_0.distcp": (SAME, SAME),
    "run/metrics.jsonl": ((3, "not what the checkpoint knows"), (0, "")),
    "run/pools.jsonl": ((3, "not what the checkpoint knows"), (0, "")),
    "run/baseline.jsonl": ((3, "not what the checkpoint knows"), (0, "")),
    "run/config.json": (SAME, SAME),
    "run/tokenizer.model": (SAME, SAME),
    "run/tokenizer.sha256": (SAME, SAME),
    "run/eval/step_00000002.jsonl": (SAME, SAME),
    "run/report.html": (SAME, SAME),
    "cache/world-*/train.jsonl": (SAME, SAME),
    "cache/world-*/test.jsonl": (SAME, SAME),
    "cache/world-*/sha256.json": (SAME, SAME),
    "cache/shards/*/tokens.bin": (SAME, SAME),
    "cache/shards/*/tokens.idx": (SAME, SAME),
    "cache/shards/*/tokens.json": (SAME, SAME),
    "cache/[0-9a-f]*/tokens.json": (SAME, SAME),
    "cache/identities/*": (SAME, SAME),
}
"""Records and the baseline that were deleted are gone, and the run goes on without what they held."""
SAMPLE = {
    ("flip", "run/metrics.jsonl"),
    ("flip", "run/baseline.jsonl"),
    ("cut", "cache/world-*/train.jsonl"),
    ("flip", "cache/shards/*/tokens.bin"),
}


@pytest.fixture(scope="module")
def made(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of two steps, and the same with a third."""
    two, three = (tmp_path_factory.mktemp(name) for name in ("two", "three"))
    for folder, steps in ((two, 2), (three, 3)):
        plain = {"batch_size": 2, "candidates": [{"rollouts": 2}], "rewriter": {"backend": "none"}}
        plain |= {"eval": {"every": 1, "num_prefixes": 2}, "checkpoint": {"every": 1, "keep": 9}}
        cfg = run_config(
            folder, steps=steps, optimizer={"lr": 1e-3, "warmup_steps": 1, "min_lr_ratio": 1.0}, **plain
        )
        train(cfg, mesh)
        values = cfg.model_dump(mode="json") | {"out": "run", "steps": 3}
        values["data"]["cache"] = "cache"
        (folder / "run.toml").write_text("\n".join(toml_of(values)))
    (two / "run" / "report.html").write_text("a report")
    return two, three


def test_the_table_has_every_kind_of_file(made: tuple[Path, Path]) -> None:
    two, _ = made
    known = {path for pattern in FILES for path in two.glob(pattern)}
    known |= set((two / "run").rglob("tensorboard/*")) | {two / "run" / ".lock", two / "run.toml"}
    known |= {path for path in two.glob("run/checkpoints/step_00000001/**/*")} | set(two.glob("run/eval/*"))
    known |= {two / "run" / "sessions.jsonl", *two.glob("run/timeline/*")}  # read by reports only
    known |= set(two.glob(f"{NEWEST}/sharded/*.distcp"))
    others = [path for path in two.rglob("*") if path.is_file() and path not in known]
    assert [path.relative_to(two).as_posix() for path in others if path.stat().st_size] == []


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        pytest.param(damage, file, marks=() if (damage, file) in SAMPLE else pytest.mark.faults)
        for damage in DAMAGE
        for file in FILES
    ],
)
def test_a_run_with_a_damaged_file(
    sip: Sip, made: tuple[Path, Path], tmp_path: Path, damage: str, file: str
) -> None:
    two, three = made
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    found = sorted(tmp_path.glob(file))
    assert found
    for one in found:
        DAMAGE[damage](one)
    wanted = FILES[file][damage == "delete"]
    code, out, err = sip("train", "run.toml")
    assert "Traceback" not in err
    if wanted == SAME:
        assert code == 0, err
        assert metrics(tmp_path) == metrics(three) and pools(tmp_path) == pools(three)
        return
    assert isinstance(wanted, tuple) and code == wanted[0] and wanted[1] in err, err
    if code:
        errors = [line for line in (out + err).splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and str(found[0].relative_to(tmp_path)) in errors[0], err
        found[0].unlink()  # the remedy
        assert sip("train", "run.toml")[0] == 0
