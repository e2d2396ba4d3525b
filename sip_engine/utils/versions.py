"""The versions that a result comes from: ours and its commit, the libraries' below it, Python's."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata, resources
from pathlib import Path

_LIBRARIES = ("torch", "megatron-core", "triton")
_COMMIT = "commit.txt"
"""Written into a built package by setup.py; a checkout has no such file and asks git."""


def versions() -> dict[str, str]:
    """Name -> version, imported from nothing but the packages' own metadata; "not installed" where there is none."""
    found = {"sip-engine": _installed("sip-engine"), "commit": commit()}
    return found | {name: _installed(name) for name in _LIBRARIES} | {"python": platform.python_version()}


def commit() -> str:
    """The git commit of this code, 12 digits, with "-dirty" behind it if files were changed since; or "unknown"."""
    baked = resources.files("sip_engine") / _COMMIT
    if baked.is_file():
        return baked.read_text(encoding="utf-8").strip()
    return described(Path(__file__).resolve().parents[2]) or "unknown"


def described(checkout: Path) -> str | None:
    """What git says of the commit of a checkout's top folder; None where that is none, or git is missing."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
