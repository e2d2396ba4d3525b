"""Settings given on the command line, such as `--data.path DIR --objective.beta=0.2`."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sip_engine.utils.errors import ConfigError

if TYPE_CHECKING:
    from sip_engine.config.schema import RunConfig


def read_run_config(
    config: Path,
    args: list[str],
    over: dict[str, Any] | None = None,
    *,
    complete: Callable[[dict[str, Any], str], dict[str, Any]] | None = None,
) -> RunConfig:
    """A config file with the command line's overrides `args`, and `over` on top.

    `complete` fills in what the settings (and the file's name, for messages) leave to something else.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    from sip_engine.config.files import find_config
    from sip_engine.config.parse import merge_settings, parse_config, read_toml

    config = find_config(config)
    settings = merge_settings(read_toml(config), parse_overrides(args))
    settings = merge_settings(settings, over or {})
    return parse_config(complete(settings, str(config)) if complete else settings, str(config))


def parse_overrides(args: list[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value` pairs as nested tables; values are TOML where they parse as it.

    Raises:
        ConfigError: one is not of that form.
    """
    result: dict[str, Any] = {}
    rest = list(args)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r}: expected --section.setting VALUE")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{flag} needs a value")
            value = rest.pop(0)
        table = result
        *sections, key = name.replace("-", "_").split(".")
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(
                    f"{flag}: {section!r} was given a value before and has no settings of its own"
                )
        table[key] = _parse_value(value)
    return result


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
