"""Makes the lock files beside it from pyproject.toml and constraints.txt: every version and every file's SHA-256.

    dev.lock         all that the tests need, but for torch
    torch-cuda.lock  torch as PyPI has it, and what that needs besides
    torch-cpu.lock   its build without CUDA, which PyTorch's own index and some mirrors have
    gpu-image.lock   of dev.lock, what an image with torch, triton and numpy lacks for `python -m benchmarks gpu`
    real.lock        the two packages whose models `sip real` reads
    tools.lock       what makes and audits these files

`make lock` runs it. The files name no index: whichever pip is set up with must serve these very files.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
CONSTRAINTS = FOLDER.parent / "constraints.txt"
CUDA = re.compile(r"nvidia-(?!ml-py)|cuda-|torch==")
CPU_BUILDS = {"2.13.0+cpu": ("6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",)}
"""By version, SHA-256 of wheels without CUDA (CPython 3.11, Linux x86_64): PyPI, which uv resolves from, has none."""
GPU_IMAGE = {
    *(
        "megatron-core",
        "pydantic",
        "pydantic-core",
        "annotated-types",
        "typing-inspection",
        "tenacity",
        "scipy",
    ),
    *(
        "backports-zstd",
        "ijson",
        "simpy",
        "psutil",
        "typer",
        "click",
        "shellingham",
        "rich",
        "markdown-it-py",
    ),
    *("mdurl", "pygments", "tokenizers", "sentencepiece", "pyarrow", "safetensors", "nvidia-ml-py"),
}
"""What an image with torch, triton and numpy lacks for `python -m benchmarks gpu`."""
_ENTRY = re.compile(r"^(?=[a-z0-9])", re.MULTILINE)


def resolve(uv: str, *arguments: str, given: str | None = None) -> list[str]:
    """The entries of a lock file: name==version, marker and hashes, for Python 3.11 and 3.12."""
    command = [uv, "pip", "compile", *arguments, "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-emit-index-url", "--no-header", "--no-annotate"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return [entry for entry in _ENTRY.split(done.stdout) if entry.strip()]


def write(name: str, entries: list[str]) -> None:
    """One file, without what no supported interpreter asks for."""
    header = "# Made by `make lock`; changes go into pyproject.toml and constraints.txt.\n"
    (FOLDER / name).write_text(header + "".join(entries))
    print(f"{FOLDER.name}/{name}: {len(entries)} entries")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the lock files anew.")
    parser.add_argument("--uv", default="uv", help="the uv to resolve with")
    uv = parser.parse_args().uv
    everything = resolve(
        uv, str(FOLDER.parent / "pyproject.toml"), "--extra", "dev", "--constraint", str(CONSTRAINTS)
    )
    write("dev.lock", [entry for entry in everything if not CUDA.match(entry)])
    write("gpu-image.lock", [entry for entry in everything if entry.partition("==")[0] in GPU_IMAGE])
    write("torch-cuda.lock", [entry for entry in everything if CUDA.match(entry)])
    hashes = {
        version: "".join(f" --hash=sha256:{one}" for one in files) for version, files in CPU_BUILDS.items()
    }
    write("torch-cpu.lock", [f"torch=={version}{of_files}\n" for version, of_files in hashes.items()])
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(("llm-", "gt-"))]
    write("real.lock", resolve(uv, "-", "--no-deps", given="\n".join(pins)))
    write("tools.lock", resolve(uv, "-", given="uv\npip-audit\n"))


if __name__ == "__main__":
    main()
