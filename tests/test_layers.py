"""One module alone touches process groups' set-up; the other rules of imports are contracts in pyproject.toml."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sip_engine"
SET_UP = {
    "parallel_state",
    "initialize_model_parallel",
    "destroy_model_parallel",
    "model_parallel_cuda_manual_seed",
    "init_process_group",
    "destroy_process_group",
    "init_device_mesh",
    "new_group",
    "new_subgroups",
    "new_subgroups_by_enumeration",
}


def names_in(path: Path) -> set[str]:
    """Every name, attribute and imported name of a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found |= {part for alias in names for part in alias.name.split(".")}
                if isinstance(node, ast.ImportFrom):
                    found |= set((node.module or "").split("."))
    return found


def test_one_module_touches_parallel_state() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if not path.is_symlink()]
    files += list((PACKAGE / "kernels").resolve().glob("*.py"))
    users = {path.name: names & SET_UP for path in files if (names := names_in(path)) & SET_UP}
    assert users.keys() == {"mesh.py"}, users
    assert users["mesh.py"] >= {"parallel_state", "init_process_group"}
