"""A folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sip_engine.utils.errors import CheckpointError, DataError
from sip_engine.utils.files import atomic_folder


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
    try:
        with atomic_folder(out) as temporary:
            yield temporary
    except (OSError, SafetensorError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{out}: cannot be written ({reason}); free space or name another folder"
        ) from error
