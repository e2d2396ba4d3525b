"""Settings as files and nested tables: read, merged, checked with faults in one line, compared, and described."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sip_engine.config.data import DataSource, WorldConfig
from sip_engine.config.schema import CandidateStage, RunConfig, Section
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.regular import read_text

Merge = Callable[[dict[str, Any], dict[str, Any], Path, Path], dict[str, Any]]
"""The table of a file over that of the one it extends: the latter's table, its own, the latter's path, its own."""
_MOVED = {
    "world/reproduction.toml": "reproduction/small.toml",
    "world/large.toml": "reproduction/large.toml",
    "world/win_rate.toml": "reproduction/win_rate.toml",
}
_NESTED: dict[str, type[Section]] = {
    "candidates": CandidateStage,
    "sources": DataSource,
    "world": WorldConfig,
}
"""Sections that their field's type does not name at once: one of several, or one that may be missing."""


def parse_config(values: dict[str, Any], source: str) -> RunConfig:
    """Validate a mapping as a `RunConfig`.

    Raises:
        ConfigError: every fault, each with its key, in one line; unknown keys get a suggestion.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(_describe(fault) for fault in error.errors())
        raise ConfigError(f"{source}: {faults}") from None


def read_toml(path: Path, merge: Merge | None = None) -> dict[str, Any]:
    """The file's table, over that of the file it `extends`.

    `extends = "other.toml"` stands at the top of a file or of one of its tables, which then is that file with what
    the table says in its place: tables are merged setting by setting (`merge_settings`, or at the top of the file
    `merge`), all else is replaced. The name is relative to the file that says it; the other file may extend a
    third one.

    Raises:
        ConfigError: a file is missing or not TOML, or files extend each other in a circle.
    """
    try:
        return _read_extended(find_config(path), merge or _merge_plainly, ())
    except RecursionError:
        raise ConfigError(f"{path}: not a readable TOML file: nested too deeply") from None


def find_config(path: Path) -> Path:
    """The path itself or, with a notice, where a file of the examples has gone that lay there in the last version."""
    moved = _MOVED.get("/".join(path.parts[-2:]))
    if moved is None or path.exists():
        return path
    from sip_engine.utils.progress import console

    found = path.parent.parent / moved
    console.print(
        f"{path} is {found} now; the old name works in this version only", soft_wrap=True, markup=False
    )
    return found


def _read_extended(path: Path, merge: Merge, extending: tuple[Path, ...]) -> dict[str, Any]:
    try:
        values = tomllib.loads(read_text(path))
    except FileNotFoundError:
        by = f" ({extending[-1]} extends it)" if extending else ""
        raise ConfigError(f"{path}: no such config file{by}; configs/ holds examples") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a readable TOML file: {error}") from None

    def extended(table: dict[str, Any], merge: Merge, where: str) -> dict[str, Any]:
        own = {
            name: extended(value, _merge_plainly, f"{where}{name}.") if isinstance(value, dict) else value
            for name, value in table.items()
            if name != "extends"
        }
        if "extends" not in table:
            return own
        name = table["extends"]
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"{path}: {where}extends: must be the name of another file, beside this one if it is relative"
            )
        other = find_config(path.parent / name)
        chain = (*extending, path)
        if any(other.resolve() == one.resolve() for one in chain):
            circle = " -> ".join(one.name for one in (*chain, other))
            raise ConfigError(f"{path}: {where}extends itself ({circle}); name another file")
        return merge(_read_extended(other, merge, chain), own, other, path)

    return extended(values, merge, "")


def _merge_plainly(base: dict[str, Any], over: dict[str, Any], other: Path, path: Path) -> dict[str, Any]:
    del other, path
    return merge_settings(base, over)


def merge_settings(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested tables of settings, those of `over` in the place of the same ones of `base`."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_settings(merged[key], value) if both else value
    return merged


def changed_settings(before: Any, now: Any, path: str = "") -> list[str]:
    """`name old -> new` of every setting that differs; nothing when there is no `before`."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in now if name in before]
        return [
            c
            for name in names
            for c in changed_settings(before[name], now[name], f"{path}.{name}".lstrip("."))
        ]
    return [] if (before is None and not path) or before == now else [f"{path} {before} -> {now}"]


def _describe(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        message = fault["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    near = difflib.get_close_matches(str(fault["loc"][-1]), _known_keys(fault["loc"][:-1]), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_known_keys(fault['loc'][:-1]))}"
    return f"unknown key {where!r}{hint}"


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    section: Any = RunConfig
    for part in path:
        if isinstance(part, int):
            continue
        section = _NESTED.get(part, section.model_fields[part].annotation)
    return list(section.model_fields)


def describe_settings() -> str:
    """Every setting as `section.name = default` with its meaning on the next line."""
    lines: list[str] = []

    def walk(section: type[Section], prefix: str) -> None:
        lines.append(f"# {' '.join((section.__doc__ or '').split())}")
        nested = []
        for name, info in section.model_fields.items():
            inner = _NESTED.get(name, info.annotation)
            if isinstance(inner, type) and issubclass(inner, Section):
                nested.append((inner, f"{prefix}{name}."))
            default = info.get_default(call_default_factory=True)
            if not isinstance(default, BaseModel) and name not in ("candidates", "sources"):
                lines.append(f"{prefix}{name} = {'unset' if default is None else default}")
                lines.append(f"    {' '.join((info.description or '').split())}")
        for inner, inner_prefix in nested:
            lines.append("")
            walk(inner, inner_prefix)

    walk(RunConfig, "")
    return "\n".join(lines)
