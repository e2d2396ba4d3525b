"""What a crash leaves in a run's folder for the one who looks into it: `crash/`, without secrets.

    crash/
        rank_0.txt        why this process ended, where it was, and the stacks of all of its threads
        versions.json     of everything a result comes from
        config.json       the run's settings
        metrics.jsonl     the last lines of its metrics

Every process that ends writes its own rank_N.txt; one that was killed cannot.
"""

from __future__ import annotations

import faulthandler
import os
import re
import shutil
import traceback
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from sip_engine.utils import heartbeat
from sip_engine.utils.files import write_atomic, write_json
from sip_engine.utils.regular import open_regular, read_bytes
from sip_engine.utils.versions import versions

FOLDER = "crash"
_LAST_LINES = 20
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def write_crash(
    out: Path, rank: int, reason: str, *, error: BaseException | None = None, key_names: Iterable[str] = ()
) -> Path | None:
    """Write this process' part of the bundle; None where it cannot be written, which must not hide the cause.

    Args:
        key_names: Environment variables whose values are secret, beside those whose names say so.
    """
    folder = out / FOLDER
    secrets = _secrets(key_names)
    with suppress(Exception):
        folder.mkdir(parents=True, exist_ok=True)
        stacks = folder / f".rank_{rank}.stacks"
        with open_regular(stacks, "w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            dumped = file.read()
        stacks.unlink()
        trace = "".join(traceback.format_exception(error)) if error is not None else ""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        text = f"{when} rank {rank} in {heartbeat.position()}\n{reason}\n\n{trace}\n{dumped}"
        write_atomic(folder / f"rank_{rank}.txt", _without(secrets, text))
        if rank == 0 or not (folder / "versions.json").exists():
            write_json(folder / "versions.json", versions())
            for name, read in (("config.json", _whole), ("metrics.jsonl", _last_lines)):
                if (out / name).is_file():
                    write_atomic(folder / name, _without(secrets, read(out / name)))
        return folder
    return None


def remove_crash(out: Path) -> None:
    """Remove what an earlier crash has left, so that a bundle is always of one end."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _secrets(key_names: Iterable[str]) -> list[str]:
    names = {name for name in os.environ if _SECRET.search(name)} | set(key_names)
    values = {os.environ.get(name, "") for name in names}
    return sorted((value for value in values if len(value) >= 4), key=len, reverse=True)


def _without(secrets: Iterable[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _whole(path: Path) -> str:
    return read_bytes(path).decode(errors="replace")


def _last_lines(path: Path) -> str:
    with open_regular(path) as file:
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        lines = file.read().decode(errors="replace").splitlines(keepends=True)
    return "".join(lines[-_LAST_LINES:])
