"""The one reader of JSON Lines, whose errors name file and line; `files.write_jsonl` writes them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sip_engine.utils.errors import DataError
from sip_engine.utils.regular import open_regular

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_jsonl(path: Path, *, complete_lines: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank; only "\\n" ends one.

    Args:
        complete_lines: Leave out a last line without its end, as a crash leaves behind in what a run appends to.

    Raises:
        DataError: missing, unreadable, or a line that is not a JSON object in UTF-8; names file and line.
    """
    try:
        with open_regular(path) as file:
            for number, line in enumerate(file, start=1):
                if complete_lines and not line.endswith(b"\n"):
                    return
                line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if line.strip():
                    yield number, parse_object(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from None


def tail_jsonl(path: Path, num_bytes: int = 1 << 18) -> list[dict[str, Any]]:
    """The objects of the last part of what a run appends to: whole lines only.

    Raises:
        DataError: as `read_jsonl`, without the line's number.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - num_bytes))
            lines = file.read().split(b"\n")[(1 if size > num_bytes else 0) : -1]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from None
    return [parse_object(line, str(path)) for line in lines if line.strip()]


def parse_object(line: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object that a line holds. Raises DataError, which begins with `where`."""
    try:
        value = parse_json(line.decode() if isinstance(line, bytes) else line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line; write it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({json_fault(error)}); write one object a line") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: a {type(value).__name__}, must be a JSON object")
    return value


def parse_json(text: str) -> Any:
    """`json.loads`, but an integer that no float can hold is an infinite one, as 1e400 is: figures are floats."""
    return json.loads(text, parse_int=_parse_int)


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits.lstrip("-")) <= sys.float_info.max_10_exp else float(digits)


def json_fault(error: ValueError | RecursionError) -> str:
    """What `json.loads` had against a text, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
