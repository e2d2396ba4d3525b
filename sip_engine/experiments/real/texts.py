"""Several megabytes of English documentation that the machine already has: docstrings and manuals, licences noted."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sip_engine.experiments.real.packages import licence, package_folder, version
from sip_engine.experiments.real.results import read_rows
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_json, write_jsonl
from sip_engine.utils.regular import read_bytes, read_text

PACKAGES = ("numpy", "scipy", "networkx", "sympy", "matplotlib", "torch", "transformers", "pandas", "sklearn")
"""Their docstrings explain in whole sentences; those that are installed are read."""
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
MANUALS = {
    "debian-handbook": ("/usr/share/doc/debian-handbook/html/en-US", "GPL-2+ or CC-BY-SA-3.0"),
    "debian-reference-en": ("/usr/share/debian-reference", "GPL-2+"),
}
"""Debian packages of prose, read where they are installed."""
SOURCES, TRAIN, HELD_OUT = "sources.json", "train.jsonl", "held_out.jsonl"
_COMMON_LICENCES = Path("/usr/share/common-licenses")
_LEAST_CHARS = 800
"""Of a document: a prefix and a suffix, and a little more."""
_MOST_CHARS = 800_000
"""Of a source, so that none drowns the others."""
_LEAST_OF_ALL = 400_000
_HELD_OUT_OF_100 = 4
_LONG_LINE = 50
_MOST_SHARED = 0.2


@dataclass
class Source:
    """Where documents come from, and how many were taken."""

    name: str
    version: str
    licence: str
    documents: int = 0
    chars: int = 0
    texts: list[tuple[str, str]] = field(default_factory=list)
    """(file, text) of each document."""

    def take(self, found: Iterable[tuple[str, str]]) -> Source:
        """Documents that are long enough, each text once, up to the most of a source."""
        seen: set[str] = set()
        for file, text in found:
            if len(text) < _LEAST_CHARS or text in seen:
                continue
            seen.add(text)
            self.texts.append((f"{self.name}/{file}", text))
            self.documents, self.chars = self.documents + 1, self.chars + len(text)
            if self.chars >= _MOST_CHARS:
                break
        return self


def gather(folder: Path) -> list[dict[str, Any]]:
    """Write train.jsonl and held_out.jsonl into `folder` unless they are there; what the page says of the sources.

    Held out are whole files, and of these no document that shares a fifth of its long lines with the others: what
    packages repeat word for word is no test.

    Raises:
        DataError: the machine has less text than two experiments need.
    """
    if (folder / SOURCES).is_file():
        return read_rows(folder / SOURCES, "name", "version", "licence", "documents", "chars")
    sources = [source for source in _sources() if source.texts]
    total = sum(source.chars for source in sources)
    if total < _LEAST_OF_ALL:
        raise DataError(
            f"this machine has {total / 1000:.0f} kB of documentation, at least {_LEAST_OF_ALL / 1000:.0f} are "
            f"needed: install one of {', '.join(PACKAGES)}, or give your own: --text PATH"
        )
    train, held_out = split([text for source in sources for text in source.texts])
    write_jsonl(folder / TRAIN, ({"text": text, "file": file} for file, text in train))
    write_jsonl(folder / HELD_OUT, ({"text": text, "file": file} for file, text in held_out))
    about = [
        {
            "name": s.name,
            "version": s.version,
            "licence": s.licence,
            "documents": s.documents,
            "chars": s.chars,
        }
        for s in sources
    ]
    write_json(folder / SOURCES, about)  # last: the files before it are whole
    return about


def gather_licences(path: Path) -> Path:
    """Write the machine's licences, prose of lawyers, as a JSONL file unless it is there; returns `path`.

    Each paragraph once: most licences are a few words away from another one.
    """
    if path.is_file():
        return path
    installed = [one for folder in sys.path for one in Path(folder).glob("*.dist-info/**/*LICEN[CS]E*")]
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for file in (*sorted(_COMMON_LICENCES.glob("*")), *sorted(installed)):
        try:
            parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", read_text(file))]
        except (OSError, UnicodeDecodeError):
            continue
        text = "\n\n".join(part for part in parts if part.lower() not in seen)
        if len(text) >= _LEAST_CHARS and is_prose(text):
            seen.update(part.lower() for part in parts)
            rows.append({"text": text, "file": str(file)})
    write_jsonl(path, rows)
    return path


Document = tuple[str, str]


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, by a hash of their file's name; near copies are not held out."""
    train = [one for one in documents if _hash(one[0]) % 100 >= _HELD_OUT_OF_100]
    held_out = [one for one in documents if _hash(one[0]) % 100 < _HELD_OUT_OF_100]
    known = {line for _, text in train for line in _long_lines(text)}

    def is_new(text: str) -> bool:
        lines = _long_lines(text)
        return sum(line in known for line in lines) <= _MOST_SHARED * max(1, len(lines))

    return train, [(file, text) for file, text in held_out if is_new(text)]


def _sources() -> Iterator[Source]:
    python = Source("Python's language reference and library", sysconfig.get_python_version(), "PSF-2.0")
    yield python.take([*_topics(), *_docstrings(Path(sysconfig.get_paths()["stdlib"]))])
    for name in PACKAGES:
        folder, distribution = package_folder(name), _DISTRIBUTIONS.get(name, name)
        if folder is not None:
            found = Source(distribution, version(distribution), licence(distribution))
            yield found.take(_docstrings(folder))
    for name, (path, terms) in MANUALS.items():
        if Path(path).is_dir():
            yield Source(f"{name} (Debian)", "", terms).take(_manual(Path(path)))


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from ((f"topics/{name}", text.strip()) for name, text in sorted(topics.items()))


def _docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Cleaned docstrings of all Python files under a folder but tests, in an order of no meaning; nothing is run."""
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    left_out = {"tests", "test", "site-packages", "dist-packages", "_vendor", "idlelib"}
    kept = [path for path in files if not left_out & set(path.parts)]
    for path in sorted(kept, key=lambda path: (_hash(path.as_posix()), path.as_posix())):
        try:
            tree = ast.parse(read_bytes(root / path))
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = (ast.get_docstring(node) or "").strip()
                if is_prose(text):
                    yield path.as_posix(), text


def is_prose(text: str) -> bool:
    """Whether a text is mostly words: three quarters letters and spaces, and English by its commonest words."""
    words = text.lower().split()
    common = sum(word in _COMMON for word in words)
    letters = sum(char.isalpha() or char.isspace() for char in text)
    return len(words) > 20 and letters >= 0.75 * len(text) and common >= 0.12 * len(words)


_WORDS = "the of a to is in and be for that are with this as it or by an if not on from which"
_COMMON = frozenset(_WORDS.split(" "))


def _manual(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.html")):
        reader = _Paragraphs()
        try:
            reader.feed(read_text(path))
        except (OSError, UnicodeDecodeError):
            continue
        yield path.relative_to(folder).as_posix(), "\n\n".join(reader.paragraphs)


class _Paragraphs(HTMLParser):
    """The text of each <p>, its line breaks as spaces."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._open: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        if tag == "p":
            self._open = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "p" and self._open is not None:
            if text := " ".join("".join(self._open).split()):
                self.paragraphs.append(text)
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._open.append(data)


def _long_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= _LONG_LINE]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "big")
