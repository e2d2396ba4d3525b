"""The registry: names of built-in, registered and installed implementations, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sip_engine.utils.errors import ConfigError
from sip_engine.utils.registry import Registry


def registry() -> Registry[object]:
    return Registry("shape", "sip_engine.test_shapes", {"square": "fractions:Fraction"})


def install(folder: Path, package: str, source: str, entries: str) -> None:
    """A package as pip leaves it: the module, and a dist-info with its entry points."""
    (folder / f"{package}.py").write_text(source)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sip_engine.test_shapes]\n{entries}\n")


def test_names_come_from_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fractions import Fraction

    shapes = registry()
    shapes.register("circle")(int)
    install(tmp_path, "outside_shapes", "class Star: pass\n", "star = outside_shapes:Star")
    monkeypatch.syspath_prepend(tmp_path)
    assert shapes.names() == ["square", "circle", "star"]
    assert shapes.get("square") is Fraction and shapes.get("circle") is int
    star = shapes.get("star")
    assert star is sys.modules["outside_shapes"].Star and shapes.get("star") is star


def test_a_name_is_given_once() -> None:
    shapes = registry()
    shapes.register("circle")(int)
    shapes.register("circle")(int)
    for name in ("circle", "square"):
        with pytest.raises(ConfigError, match=f"shape '{name}' is there already"):
            shapes.register(name)(str)
    shapes.forget("circle")
    shapes.register("circle")(str)


def test_unknown_ambiguous_and_broken_names_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = registry()
    install(tmp_path, "broken_shapes", "import nowhere_at_all\n", "star = broken_shapes:Star")
    for package in ("first_shapes", "second_shapes"):
        install(tmp_path, package, "class Moon: pass\n", f"moon = {package}:Moon")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (
        ("sqare", r"unknown shape 'sqare'; known: square, moon, star; did you mean 'square'\?"),
        ("zzz", "unknown shape 'zzz'; known: square, moon, star$"),
        ("star", "entry point broken_shapes:Star.* cannot be loaded: ModuleNotFoundError: No module named"),
        ("moon", "two installed packages, first_shapes:Moon and second_shapes:Moon: remove one"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            shapes.get(name)
        assert "\n" not in str(caught.value)
