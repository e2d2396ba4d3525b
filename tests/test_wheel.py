"""A built wheel is whole: outside a checkout its commands find configs, templates and the extension."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in an environment that holds `env` too."""
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )


def succeeds(*command: object, cwd: Path, **env: str) -> str:
    """Standard output of a command that ends with 0."""
    done = run(*command, cwd=cwd, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, committed, so that a build leaves nothing in the checkout and knows a commit."""
    copy = tmp_path_factory.mktemp("source") / "copy"
    for name in succeeds("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@example.com")
    for args in (("init", "-q"), ("add", "."), ("commit", "-qm", "copy")):
        succeeds(*git, *args, cwd=copy)
    return copy


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel was unpacked into."""
    folder = tmp_path_factory.mktemp("installed")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    succeeds(sys.executable, "-c", build, folder, cwd=source)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_quickstart_runs_from_a_wheel_outside_a_checkout(
    installed: Path, source: Path, tmp_path: Path
) -> None:
    sip = (sys.executable, "-P", "-m", "sip_engine")
    where = {"PYTHONPATH": str(installed)}
    head = succeeds("git", "rev-parse", "HEAD", cwd=source)
    versions = dict(
        line.split(maxsplit=1) for line in succeeds(*sip, "--version", cwd=tmp_path, **where).splitlines()
    )
    assert head.startswith(versions["commit"].removesuffix("-dirty"))  # so it is the wheel that runs

    succeeds(*sip, "quickstart", "--scale", "0.01", "--out", "q", cwd=tmp_path, **where)
    summary = json.loads((tmp_path / "q" / "summary.json").read_text())
    assert {"base", "standard", "self_improving"} <= summary.keys()
    assert "<svg" in (tmp_path / "q" / "report.html").read_text()

    dry = succeeds(*sip, "train", "configs/text.toml", "--dry-run", "--data.path", "x", cwd=tmp_path, **where)
    assert json.loads(dry)["data"]["path"] == "x"
    done = run(*sip, "reproduce", "--rows", "nosuch", cwd=tmp_path, **where)
    assert done.returncode == 2 and "quality_2" in done.stderr, done.stderr


def test_a_source_distribution_holds_what_a_wheel_is_built_from(source: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    succeeds(sys.executable, "-c", build, tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = set(succeeds("git", "ls-files", cwd=source).splitlines())
    for link in ("kernels", "configs"):
        tracked |= {f"sip_engine/{name}" for name in tracked if name.startswith(f"{link}/")}
    wanted = {name for name in tracked if name.startswith(("sip_engine/", "csrc/"))}
    assert not wanted - names - {"sip_engine/kernels", "sip_engine/configs"}
