"""Reads evaluation files row by row; what cannot be read is named by file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from sip_engine.utils.errors import DataError
from sip_engine.utils.jsonl import json_fault, read_jsonl
from sip_engine.utils.regular import read_text


@dataclass(frozen=True)
class FileRow:
    """One row of a file; asks for its fields and names itself in errors."""

    where: str
    """path:line, or path and row of a JSON array"""
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
        DataError: missing, not UTF-8, without rows, or not of its format, with the line (of an array the row).
    """
    text = _read(path)
    if path.suffix.lower() == ".csv":
        rows = list(_csv_rows(path, text))
    elif text.lstrip().startswith("["):
        rows = list(_array_rows(path, text))
    else:
        rows = [FileRow(f"{path}:{number}", row) for number, row in read_jsonl(path)]
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
        return read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise DataError(f"{path}: cannot be read ({reason}); give the path of the set's own file") from None


def _csv_rows(path: Path, text: str) -> Iterator[FileRow]:
    """Rows by the names of the header, each with the line that it ends on."""
    reader = csv.DictReader(StringIO(text, newline=""), strict=True, restkey="", restval=None)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if "" in row or None in row.values():
                names = ", ".join(reader.fieldnames or ())
                raise DataError(f"{where}: not as many columns as the header ({names}); is a quote missing?")
            yield FileRow(where, row)
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.reader.line_num}: not CSV ({error}); give the set's own file"
        ) from None


def _array_rows(path: Path, text: str) -> Iterator[FileRow]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: not JSON ({json_fault(error)}); give the set's own file") from None
    for number, value in enumerate(values, start=1):
        where = f"{path}: row {number}"
        if not isinstance(value, dict):
            raise DataError(f"{where}: a {type(value).__name__}, must be a JSON object")
        yield FileRow(where, value)
