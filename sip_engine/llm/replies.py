"""What a model wraps its reply in, taken off: thoughts, fences, end tokens, markdown; and the JSON object in it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from sip_engine.types import Failure

MAX_REPLY_CHARS = 100_000
_MAX_ATTEMPTS = 500
"""Braces that are tried as the beginning of an object."""

_THINKING = r"think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad"
_SPACE = r"(?:\w{1,20}:)?"
_ATTRIBUTES = r"(?:\s[^<>\n=]{1,40}=[^<>\n]{1,80})?"
_THOUGHTS_BEGIN = re.compile(
    rf"<\|?{_SPACE}(?:(?:begin_of|start)_)?(?:{_THINKING}){_ATTRIBUTES}\|?>|\[THINK\]|\u25c1think\u25b7",
    re.IGNORECASE,
)
_THOUGHTS_END = re.compile(
    rf"<\|?/\|?{_SPACE}(?:{_THINKING})\|?>|<\|end_(?:of_)?(?:{_THINKING})\|>|\[/THINK\]|\u25c1/think\u25b7"
    r"|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)
# Tags of an answer and special tokens that leak, with their bars also in full width; TeX that frames a result.
_TAGS = re.compile(
    rf"</?[A-Za-z_]{{1,20}}{_ATTRIBUTES}/?>|<[|\uff5c][^<>|\uff5c\n]{{1,40}}[|\uff5c]>|\\(?:boxed|text|mathrm)\b"
)
_LINE_END = re.compile(r"\n|<br\s?/?>|</p>", re.IGNORECASE)
_FENCE = re.compile(r"\s*(?:```+|~~~+)[ \t]*[A-Za-z_]{0,12}\s*$|~~~+")
_MARKDOWN = re.compile(r"[*`\"'\u2018\u2019\u201c\u201d\u00ab\u00bb$\\{}]|(?<![^\W_])_+|_+(?![^\W_])")


def reply_itself(reply: str) -> str | Failure:
    """A reply without the thoughts in front of it; a Failure if it is too long, empty, or nothing but thoughts."""
    if len(reply) > MAX_REPLY_CHARS:
        return Failure(f"the reply is longer than {MAX_REPLY_CHARS:,} characters")
    ends = [match.end() for match in _THOUGHTS_END.finditer(reply)]
    rest = reply[ends[-1] :] if ends else reply
    if _THOUGHTS_BEGIN.search(rest):
        return Failure("the reply's thoughts do not end")
    if not rest.strip():
        return Failure("the reply is empty" if not ends else "the reply is empty but for its thoughts")
    return rest


def plain_line(line: str) -> str:
    """A line as it is meant: without tags, markdown, quotes and leaked tokens, in compatible characters (NFKC)."""
    return _MARKDOWN.sub("", unicodedata.normalize("NFKC", _TAGS.sub("", _FENCE.sub("", line)))).strip()


def plain_lines(text: str) -> list[str]:
    """The lines of a text that say something once they are plain."""
    # Not splitlines(): its notion of a line end is wider than that of the model that was asked for a line.
    plain = [plain_line(line) for line in _LINE_END.split(text)]
    return [line for line in plain if re.search(r"\w", line)]


def read_object(reply: str, keys: Sequence[str], mark: str) -> dict[str, Any] | Failure:
    """The one JSON object of a reply that has the mark as its `id`, with at least these keys, each once.

    Prose, a fence or an object around it do no harm, as the mark is known to nobody else; nothing but wrapping may
    stand behind it. Keys are returned in lower case.
    """
    text = reply_itself(reply)
    if isinstance(text, Failure):
        return text
    tops, rest = _top_objects(text)
    found = [one for top in tops for one in _objects_in(top)]
    if not found:
        return Failure("the reply is not one JSON object")
    if any(one is _TWICE for one in found):
        return Failure("the reply is not a JSON object with the keys asked for, each once")
    lowered = [{str(key).lower(): value for key, value in one.items()} for one in found]
    ours = [one for one in lowered if str(one.get("id")).strip().lower() == mark]
    if not ours:
        has_id = any("id" in one for one in lowered)
        return Failure(
            "the reply has a wrong mark" if has_id else "the reply's object has not the keys asked for"
        )
    if len(ours) > 1:
        return Failure("there is more than one object with the mark")
    if plain_lines(rest):
        return Failure("the reply goes on behind its JSON object")
    if not set(keys) <= ours[0].keys():
        return Failure("the reply's object has not the keys asked for")
    return ours[0]


_TWICE: dict[str, Any] = {}
"""Stands for an object that names a key twice: which of the two was meant?"""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    return value if len({key.lower() for key in value}) == len(pairs) else _TWICE


def _top_objects(text: str) -> tuple[list[dict[str, Any]], str]:
    """The outermost JSON objects of a text, and what stands behind the last one."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, strict=False)  # line ends within a string
    found, at, end, attempts = [], text.find("{"), 0, 0
    while at >= 0 and attempts < _MAX_ATTEMPTS:
        attempts += 1
        try:
            value, end = decoder.raw_decode(text, at)
            found.append(value)
            at = text.find("{", end)
        except (ValueError, RecursionError):
            at = text.find("{", at + 1)
    return found, text[end:].lstrip("],; \t\r\n") if found else ""


def _objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """An object and all within it."""
    if isinstance(value, dict):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        yield from _objects_in(one)
