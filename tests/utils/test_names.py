"""Names that become paths (in a manifest, a bundle, an index of weights, a plan): none leaves its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sip_engine.data.bundled_tokenizer import bundled_files, write_bundle
from sip_engine.experiments.reproduction.plan import Arm, Stage
from sip_engine.huggingface.shards import open_shards
from sip_engine.policy.checkpoint_files import FileEntry, read_manifest
from sip_engine.utils.errors import CheckpointError, DataError
from sip_engine.utils.files import write_json
from sip_engine.utils.names import is_file_name, stays_inside

NAMES = st.text(st.sampled_from("./\\a\x00~\u00e9 \n-"), max_size=12) | st.sampled_from(
    ("../state.json", "/etc/passwd", "sharded/../../x", ".", "..", "a/", "./a", "a//b", ".hidden")
)


def inside(folder: Path, name: str) -> bool:
    """By the system's own rules: a file strictly below the folder, in the folder that its name says."""
    place = os.path.normpath(os.path.join(folder, name))
    return "\0" not in name and place.startswith(f"{folder}/") and place == f"{folder}/{name}"


def by_manifest(folder: Path, name: str) -> bool:
    entry = FileEntry(bytes=0, sha256="0" * 64).model_dump()
    write_json(
        folder / "manifest.json",
        {"state.json": entry, "tokenizer.model": entry, "sharded/a": entry, name: entry},
    )
    try:
        return name in read_manifest(folder)
    except CheckpointError:
        return False


def by_bundle(folder: Path, name: str) -> bool:
    del folder
    try:
        return name in bundled_files(write_bundle({name: b"x"}, vocab_size=2, bos_id=0, eos_ids=[1]), "test")
    except DataError:
        return False


def by_index(folder: Path, name: str) -> bool:
    """Whether the file was opened, which is empty."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    if inside(folder, name) and "/" not in name:
        (folder / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as seen:
        open_shards(folder, {"w": (1,)})
    return "not there" not in str(seen.value)


def by_stage(folder: Path, name: str) -> bool:
    return _is_valid(lambda: Stage(name=name, config=Path("x.toml")))


def by_row(folder: Path, name: str) -> bool:
    return _is_valid(lambda: Arm(name=name, label="x", table="y"))


def _is_valid(make: Callable[[], object]) -> bool:
    try:
        make()
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("accepts", [by_manifest, by_bundle, by_index, by_stage, by_row])
@given(name=NAMES)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_name_that_is_accepted_stays_inside(
    tmp_path: Path, accepts: Callable[[Path, str], bool], name: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    if accepts(folder, name):
        assert inside(folder, name)
        assert accepts is by_manifest or "/" not in name


@given(name=NAMES)
def test_the_rules_are_the_systems(name: str) -> None:
    assert not stays_inside(name) or inside(Path("/base"), name)
    assert not is_file_name(name) or (inside(Path("/base"), name) and "/" not in name)
    if inside(Path("/base"), name) and not name.startswith("."):
        assert stays_inside(name)
