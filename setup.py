"""Build the compiled extension sip_engine._csrc; all else about the package is in pyproject.toml."""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


class BuildExt(build_ext):
    """Several processes may build at once, and others may import meanwhile."""

    def run(self) -> None:
        """Build under a lock, so that no two processes write the same object files."""
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        with open(temp / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().run()

    def copy_file(self, infile, outfile, *args, **kwargs):
        """Replace the extension in the source tree in one move: no process sees half a file."""
        partial = f"{outfile}.{os.getpid()}.tmp"
        shutil.copy2(infile, partial)
        os.replace(partial, outfile)
        return outfile, True


class BuildPy(build_py):
    """Writes the commit that a package is built from into it, for `sip --version`; a checkout asks git itself."""

    def run(self) -> None:
        """Build, then write the commit, if git knows it."""
        super().run()
        if self.editable_mode or not Path(".git").exists():
            return
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            return
        if done.returncode == 0:
            Path(self.build_lib, "sip_engine", "commit.txt").write_text(done.stdout)


setup(
    ext_modules=[
        Pybind11Extension(
            "sip_engine._csrc",
            sources=["csrc/bindings.cpp", "csrc/page_allocator.cpp", "csrc/wave_planner.cpp"],
            depends=["csrc/views.h", "csrc/page_allocator.h", "csrc/wave_planner.h"],
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
