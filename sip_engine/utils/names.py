"""Names from files of others that become paths: what they may be, so that none leaves the folder it is meant for."""

from __future__ import annotations

from pathlib import PurePosixPath


def is_file_name(name: str) -> bool:
    """Whether it names a file of the folder itself: one part, which is neither hidden nor "..", without NUL."""
    return bool(name) and "/" not in name and "\0" not in name and not name.startswith(".")


def stays_inside(name: str) -> bool:
    """Whether it is a plain path below the folder: no part is ".." or ".", it is not absolute, and has no NUL."""
    parts = PurePosixPath(name).parts
    whole = bool(parts) and name == "/".join(parts)
    return whole and ".." not in parts and not name.startswith("/") and "\0" not in name
