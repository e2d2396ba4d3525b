"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sip_engine.utils.errors import CheckpointError, DataError


def check_free(out: Path) -> None:
    """Raises CheckpointError when there is already something at `out`; an empty folder may be."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out}: already there; remove it or name another folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that becomes it when the block ends well, and vanishes when not.

    Raises:
        CheckpointError: it cannot be written, or `out` was taken since `check_free`.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
    except (OSError, SafetensorError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{out}: cannot be written ({reason}); free space or name another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
