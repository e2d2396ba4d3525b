"""Makes `benchmarks` importable, which is not installed, without the repository's root on the path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def _link() -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])


_link()
