"""Settings as files and nested tables: read, merged, checked with faults in one line, compared, and described."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sip_engine.config.schema import CandidateStage, RunConfig, Section, WorldConfig
from sip_engine.utils.errors import ConfigError

_NESTED: dict[str, type[Section]] = {"candidates": CandidateStage, "world": WorldConfig}
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


def load_config(path: Path) -> RunConfig:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing, is not TOML, or holds a wrong setting.
    """
    return parse_config(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The file's table; ConfigError when it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; configs/ holds examples") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a readable TOML file: {error}") from None


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
            if not isinstance(default, BaseModel) and name != "candidates":
                lines.append(f"{prefix}{name} = {'unset' if default is None else default}")
                lines.append(f"    {' '.join((info.description or '').split())}")
        for inner, inner_prefix in nested:
            lines.append("")
            walk(inner, inner_prefix)

    walk(RunConfig, "")
    return "\n".join(lines)
