"""The lock files: all that is asked for is in them, in the versions that constraints.txt names, with hashes alone."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(
    r"^([a-z0-9][\w.-]*)==([\w.+]+)(?: ; [^\\]+?)?((?: ?\\?\n? +--hash=sha256:[0-9a-f]{64})+)$", re.M
)


def locked(*names: str) -> dict[str, set[str]]:
    """Versions by name; fails where a line of the files is anything but a version with its hashes."""
    found: dict[str, set[str]] = {}
    for name in names:
        text = (ROOT / "requirements" / name).read_text()
        rest = ENTRY.sub("", text)
        assert all(line.startswith("#") for line in rest.splitlines() if line.strip()), rest[:500]
        for entry in ENTRY.finditer(text):
            found.setdefault(canonicalize_name(entry[1]), set()).add(entry[2])
    return found


@pytest.mark.parametrize("build", ["torch-cpu.lock", "torch-cuda.lock"])
def test_all_that_is_asked_for_is_locked(build: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = project["project"]["optional-dependencies"]
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    asked += [*optional["dev"], *optional["gguf"], *optional["real"]]
    versions = locked("dev.lock", build)
    for requirement in map(Requirement, asked):
        found = versions.get(canonicalize_name(requirement.name), set())
        assert found and all(requirement.specifier.contains(one) for one in found), requirement


def test_the_versions_are_those_of_the_constraints() -> None:
    versions = locked("dev.lock", "torch-cpu.lock", "torch-cuda.lock", "real.lock")
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins: dict[str, list[Requirement]] = {}
    for pin in map(Requirement, lines):  # a package may have a version for each Python
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    for name, wanted in pins.items():
        found = versions.get(name, set())
        held = [{one for one in found if pin.specifier.contains(one)} for pin in wanted]
        assert all(held) and set().union(*held) == found, f"{wanted}: run `make lock`"
    assert locked("gpu-image.lock").items() <= locked("dev.lock").items()
    assert {"uv", "pip-audit"} <= locked("tools.lock").keys()
