"""Where config files lie: those that travel with the package are found from any folder."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

_TOP = "configs"


def shipped_configs() -> Path:
    """The folder `configs` that travels with the package."""
    return Path(str(resources.files("sip_engine") / _TOP))


def find_config(path: Path) -> Path:
    """`path` where there is such a file; else a path such as `configs/text.toml` names the package's own file.

    Where neither is there `path` comes back, for its reader to complain about.
    """
    if path.exists() or path.is_absolute() or path.parts[:1] != (_TOP,):
        return path
    shipped = shipped_configs().joinpath(*path.parts[1:])
    return shipped if shipped.is_file() else path
