"""What starts fast imports no tensor library; what imports one says nothing but our own lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from sip_engine.config.schema import RunConfig

HEAVY = {"torch", "megatron", "triton", "pyarrow", "sentencepiece", "openai"}
DRAWING = {"matplotlib", "jinja2"}
LOADED = "LOADED "
COMMAND = f"""
import sys
from sip_engine.cli import main
try:
    main(sys.argv[1:])
finally:
    print("{LOADED}" + " ".join(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
WITHOUT_GPU = """
import sys
import torch
# To the module that looks for CUDA's compiler this is torch's CUDA build, on a machine without a GPU.
torch.cuda._is_compiled = lambda: sys._getframe(1).f_globals["__name__"] == "torch.utils.cpp_extension"
torch.version.cuda = "13.0"
from sip_engine.cli import main
main(sys.argv[1:])
"""


def python(code: str, *args: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, as far from the test's settings as can be."""
    command = [sys.executable, "-P", "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


def loaded_by(*args: object, cwd: Path) -> set[str]:
    """Top names of all modules that a successful command has loaded when it is done."""
    done = python(COMMAND, *args, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split(LOADED)[1].split())


@pytest.mark.parametrize(
    "args", ["--help", "--version", "settings", "train --help", "data --help", "train tiny.toml --dry-run"]
)
def test_commands_that_say_something_load_no_tensor_library(args: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text("steps = 2\n[data]\npath = 'texts'\n")
    loaded = loaded_by(*args.split(), cwd=tmp_path)
    assert "typer" in loaded
    assert not loaded & (HEAVY | DRAWING)


def test_a_report_loads_what_draws_and_no_tensor_library(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(RunConfig().model_dump_json())
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 1.0 / n}) + "\n" for n in (1, 2))
    )
    loaded = loaded_by("report", "run", cwd=tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert loaded >= DRAWING and not loaded & HEAVY
    assert not loaded_by("runs", ".", cwd=tmp_path) & (HEAVY | DRAWING)


def test_version_names_what_a_result_comes_from(tmp_path: Path) -> None:
    done = python("from sip_engine.cli import main; main(['--version'])", cwd=tmp_path)
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    for name in ("torch", "megatron-core", "triton"):
        assert found[name] == metadata.version(name)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    checkout = Path(__file__).parents[1]
    if (checkout / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True)
        assert head.stdout.startswith(found["commit"].removesuffix("-dirty")) and len(found["commit"]) >= 12


@pytest.mark.parametrize(
    ("words", "expected"),
    [("sip tra", {"train", "trace"}), ("sip data ju", {"judge-pairs"}), ("sip train --dr", {"--dry-run"})],
)
def test_a_shell_completes_commands_and_options(words: str, expected: set[str], tmp_path: Path) -> None:
    number = str(len(words.split()) - 1)
    done = python(COMMAND, cwd=tmp_path, _SIP_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number)
    completed, loaded = done.stdout.split(LOADED)
    assert set(completed.split()) == expected, done.stderr
    assert not set(loaded.split()) & (HEAVY | DRAWING)


def test_a_command_on_a_machine_without_gpu_says_its_own_lines_only(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    done = python(
        WITHOUT_GPU,
        *["generate", "nowhere", "--prompts", "p.jsonl", "--out", "o.jsonl"],
        cwd=tmp_path,
        CUDA_HOME="/nowhere",
    )
    assert done.returncode == 4 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nowhere: no checkpoint here")


def test_a_module_starts_a_run_and_its_old_name_says_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("stepz = 2\n")
    for module, notices in (("sip_engine", 0), ("sip_engine.train", 1)):
        args = ["train", "bad.toml"] if module == "sip_engine" else ["bad.toml"]
        command = [sys.executable, "-P", "-W", "ignore", "-m", module, *args]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        *said, last = done.stderr.splitlines()
        assert done.returncode == 2 and "did you mean 'steps'" in last
        assert [line.startswith("`python -m sip_engine.train` is now") for line in said] == [True] * notices
