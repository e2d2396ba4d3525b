"""Shorter runs for smoke tests: settings that count something, at a share of their value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sip_engine.utils.errors import ConfigError


def check_scale(scale: float) -> None:
    """Raise ConfigError unless `scale` is a share in (0, 1]."""
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale {scale:g}: must be above 0 and at most 1")


def shortened(values: Mapping[str, Any], scale: float, least: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with those that `least` names at `scale` of their value, as far as they are set.

    `least` is nested alike and holds the smallest value of each. A scale of 1 leaves all as it is.
    """

    def one(value: Any, limit: Any) -> Any:
        return (
            shortened(value, scale, limit) if isinstance(limit, Mapping) else max(limit, round(value * scale))
        )

    if scale == 1:
        return dict(values)
    return {name: one(value, least[name]) if name in least else value for name, value in values.items()}
