"""Rows of evaluation files, each with the line it begins on; what cannot be read is named by file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from sip_engine.utils.errors import DataError


@dataclass(frozen=True)
class FileRow:
    """One row of a file; asks for its fields and names itself in errors."""

    where: str
    """path:line"""
    fields: dict[str, Any]

    def text(self, name: str, *, empty: bool = False) -> str:
        """A field that must be text. Raises DataError; `empty` allows nothing but white space."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            what = "no" if value is None else f"a {type(value).__name__} as"
            raise DataError(f'{self.where}: {what} "{name}", must be text; {self._has()}')
        return self.checked(name, value, empty=empty)

    def checked(self, name: str, value: str, *, empty: bool = False) -> str:
        """`value` if it can be tokenized. Raises DataError."""
        if not value.strip() and not empty:
            raise DataError(f'{self.where}: "{name}" is empty; drop the row')
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(f'{self.where}: "{name}" has half of a surrogate pair; drop the row') from None
        return value

    def number(self, name: str) -> float | None:
        """A field that is a number, also one written as text; None where it is missing, null or empty."""
        value = self.fields.get(name)
        if value is None or value == "":
            return None
        try:
            return float(value)
        except (TypeError, ValueError):
            raise DataError(f'{self.where}: "{name}" is {value!r}, must be a number') from None

    def table(self, name: str) -> FileRow:
        """A field that must be a JSON object. Raises DataError."""
        value = self.fields.get(name)
        if not isinstance(value, dict):
            what = "no" if value is None else f"a {type(value).__name__} as"
            raise DataError(f'{self.where}: {what} "{name}", must be a JSON object; {self._has()}')
        return FileRow(f"{self.where}: {name}", value)

    def _has(self) -> str:
        return f"the row has {', '.join(self.fields) or 'nothing'}"


def read_rows(path: Path) -> list[FileRow]:
    """All rows of a .csv, of a file with one JSON object a line, or of one JSON array of objects.

    Which of the two JSON forms it is shows in the first character, whatever the file is called.

    Raises:
        DataError: missing, not UTF-8, without rows, or not of its format, with the line.
    """
    text = _read(path)
    if path.suffix.lower() == ".csv":
        rows = list(_csv_rows(path, text))
    elif text.lstrip().startswith("["):
        rows = list(_array_rows(path, text))
    else:
        rows = list(_line_rows(path, text))
    if not rows:
        raise DataError(f"{path}: no rows; give the set's own file")
    return rows


def read_lines(path: Path) -> list[FileRow]:
    """The lines of a text file that are not blank, each as the field "line". Raises DataError."""
    rows = [
        FileRow(f"{path}:{number}", {"line": line.rstrip("\r")})
        for number, line in enumerate(_read(path).split("\n"), start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{path}: no lines; give the set's own file")
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise DataError(f"{path}: cannot be read ({reason}); give the path of the set's own file") from None


def _csv_rows(path: Path, text: str) -> Iterator[FileRow]:
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        while True:
            line = reader.line_num + 1
            values = next(reader, None)
            if values is None:
                return
            if not values:
                continue
            if len(values) != len(header):
                raise DataError(
                    f"{path}:{line}: {len(values)} columns, the header has {len(header)}; is a quote missing?"
                )
            yield FileRow(f"{path}:{line}", dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV ({error}); give the set's own file") from None


def _line_rows(path: Path, text: str) -> Iterator[FileRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _object(f"{path}:{number}", _parse(f"{path}:{number}", line))


def _array_rows(path: Path, text: str) -> Iterator[FileRow]:
    """The array's objects one by one, as the parser of a whole array tells no lines."""
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    while True:
        at = _skip(text, at)
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        if text[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: not JSON ({error.msg}); give the set's own file"
            ) from None
        except RecursionError:
            raise DataError(f"{where}: not JSON (nested too deeply); give the set's own file") from None
        yield _object(where, value)
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: a comma or the array's end is missing")


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _parse(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise DataError(f"{where}: not JSON (nested too deeply); write one object a line") from None
    except ValueError as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not JSON ({message}); write one object a line") from None


def _object(where: str, value: Any) -> FileRow:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a {type(value).__name__}, must be a JSON object")
    return FileRow(where, value)
