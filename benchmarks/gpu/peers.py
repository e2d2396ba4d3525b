"""Other libraries that the acceptance run measures beside, where they import."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    name: str
    module: str
    package: str
    """Its name in the registry."""


PEERS = (
    Peer("transformers", "transformers", "transformers"),
    Peer("flash-attn", "flash_attn.flash_attn_interface", "flash-attn"),
    Peer("flash-attn 4", "flash_attn.cute.interface", "flash-attn-4"),
    Peer("FlashInfer", "flashinfer", "flashinfer-python"),
    Peer("Liger", "liger_kernel.transformers", "liger-kernel"),
    Peer("cut-cross-entropy", "cut_cross_entropy", "cut-cross-entropy"),
    Peer("quack", "quack", "quack-kernels"),
)


def why_missing(peer: Peer) -> str:
    """Empty if the peer imports, else why not."""
    try:
        importlib.import_module(peer.module)
    except Exception as error:  # a library that breaks on import is not there, whatever it raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def installed(name: str) -> bool:
    return not why_missing(next(peer for peer in PEERS if peer.name == name))
