"""Keeps libraries from saying what nobody can act on, so that a command's own lines can be read."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_megatron() -> None:
    """Silence what Megatron-core says while it is imported; to be called before that.

    Its modules warn, each for itself, that Apex and Transformer Engine are not installed, which we do without. One
    (`nccl_allocator`) imports `torch.utils.cpp_extension`, which logs "No CUDA runtime is found, using CUDA_HOME"
    on every machine that has torch's CUDA build but no GPU, though nothing is compiled.
    """
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*", module=r"megatron\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """For a command: no library's warning at all; our own messages are not warnings."""
    quiet_megatron()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
