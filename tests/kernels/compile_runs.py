"""The compile report in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-W", "ignore", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def run_report(*words: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "sip_engine.kernels.compile_report", *words)
