"""Build the compiled extension sip_engine._csrc; all else about the package is in pyproject.toml."""

import fcntl
import os
import shutil
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext


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
    cmdclass={"build_ext": BuildExt},
)
