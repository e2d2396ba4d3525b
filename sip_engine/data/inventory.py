"""Which files of a folder are its corpus, in which order, and what is passed over, by kind."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sip_engine.data.formats import KNOWN, PLAIN_TEXT, kind_of
from sip_engine.utils.errors import DataError
from sip_engine.utils.regular import check_regular, read_text

CARD = "card or licence"
METADATA = "data set's metadata"
BROKEN_LINK = "broken link"
SECOND_LINK = "folder linked twice"

_CARDS = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|code_of_conduct|"
    r"(data(set)?)[-_ ]?card|datasheet)([-_. ].*)?"
)
_LONGEST_LINK = 4096
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


class Counts(Counter[str]):
    """Numbers of things by kind."""

    def __str__(self) -> str:
        """For example `3 empty, 1 not UTF-8`."""
        return ", ".join(f"{count} {kind}" for kind, count in self.most_common()) or "none"


@dataclass(frozen=True)
class Inventory:
    """The files of a corpus."""

    files: list[Path]
    names: list[str]
    """Of each file: its path under the corpus' folder, links as they are called there."""
    read: Counts
    """Number of files by kind."""
    passed_over: Counts
    """What else lies there, by kind; hidden files and folders are not counted."""


def take_inventory(path: str | Path) -> Inventory:
    """What `read_documents(path)` reads, in its order: by relative path.

    A directory is searched recursively, through links as well, but each directory once. Hidden files and folders,
    and what data sets bring along that is no document (README, LICENSE, dataset_info.json), are left out; a file
    named by `path` itself is read whatever it is called. Raises DataError if nothing there can be read.
    """
    path = Path(path)
    if path.is_file():
        kind = kind_of(path.name)
        if kind is None:
            raise DataError(f"{path}: unknown kind of file; give a directory or one of {KNOWN}")
        return Inventory([path], [path.name], Counts([kind.name]), Counts())
    if not path.is_dir():
        raise DataError(f"{path}: {_not_readable(path)}; give the path of the training text")
    read, passed_over = Counts(), Counts()
    found: dict[str, Path] = {}
    links: list[tuple[Path, str]] = [(path, "")]
    seen: set[str] = set()
    while links:  # last, so that a shard is called by its own folder's name
        _search(*links.pop(0), found, passed_over, seen, links)
    for name, file in sorted(found.items()):
        label, is_read = _label(file)
        (read if is_read else passed_over)[label] += 1
        if not is_read:
            del found[name]
    if not found:
        others = f" (passed over: {passed_over})" if passed_over else ""
        raise DataError(
            f"{path}: no readable file in this directory{others}; put files of kind {KNOWN} there"
        )
    return Inventory([found[name] for name in sorted(found)], sorted(found), read, passed_over)


def _search(
    folder: Path,
    name: str,
    found: dict[str, Path],
    passed_over: Counts,
    seen: set[str],
    links: list[tuple[Path, str]],
) -> None:
    """Adds all visible files under `folder`, called `name` there, as name -> path; `links` gets linked folders."""
    real = os.path.realpath(folder)
    if real in seen:
        passed_over[SECOND_LINK] += 1
        return
    seen.add(real)
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read ({error.strerror}); make it readable or remove it"
        ) from None
    for entry in entries:
        path, called = folder / entry.name, f"{name}{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            _search(path, f"{called}/", found, passed_over, seen, links)
        elif inner := path if entry.is_dir() else _folder_of_text_link(path):
            links.append((inner, f"{called}/"))
        else:
            found[called] = path


def _folder_of_text_link(path: Path) -> Path | None:
    """The folder meant by a link that git wrote as a file, as it does where there are no links."""
    try:
        if "." in path.name or not path.is_file() or path.stat().st_size > _LONGEST_LINK:
            return None
        target = read_text(path)
        folder = path.parent / target
        return folder if target and "\n" not in target and folder.is_dir() else None
    except (OSError, ValueError):
        return None


def _not_readable(path: Path) -> str:
    try:
        check_regular(path)
    except FileNotFoundError:
        return "no such file or directory"
    except OSError as error:
        return str(error.strerror)
    return "cannot be read"


def _label(file: Path) -> tuple[str, bool]:
    """What a file is counted as, and whether it is read."""
    kind = kind_of(file.name)
    name = file.name.lower()
    if not file.is_file():
        return BROKEN_LINK if file.is_symlink() else "no regular file", False
    if name in _METADATA:
        return METADATA, False
    if _CARDS.fullmatch(name) and (kind is None or kind.suffix in PLAIN_TEXT):
        return CARD, False
    return (kind.name, True) if kind else (file.suffix.lower() or "file without suffix", False)
