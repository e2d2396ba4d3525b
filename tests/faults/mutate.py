"""Files made wrong: seeded mutations of JSON, JSON Lines, TOML and bytes, as a hand, a disk or a liar makes them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**70, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " ",
        "x",
        "0",
        "1e9",
        "nan",
        "\x00",
        "\ud800",
        "é\u202e",
    ),
    *(
        "../../x",
        "/etc/passwd",
        "a/b",
        ".",
        "[red]x[/red]",
        "x" * 5000,
        "\n\n",
        [],
        {},
        [[]],
        [{}],
        [None],
        [1],
    ),
    *({"": None}, {"x": {"y": []}}, {"bytes": -1}, [1, "2", None], ["x"] * 300),
)
"""Values of other types and sizes than any field has."""

NUMBERS = [
    "true",
    "-1",
    "0",
    "1",
    "7",
    "0.5",
    "1e400",
    "-1e400",
    "inf",
    "-inf",
    "nan",
    "1_0",
    "0x10",
    str(2**70),
]
OTHERS = [
    '""',
    '"x"',
    '"../../x"',
    "'\\u0000'",
    '"\\u0000"',
    "[]",
    "{}",
    "[[]]",
    "[1, 'a']",
    "{ a = 1 }",
    "1979-05-27",
]
OTHERS += [
    "07:32:00",
    "1979-05-27T07:32:00Z",
    '"/dev/zero"',
    "[{}]",
    "[{ a = [] }]",
    "'''\n\n'''",
    '"[b]x[/b]"',
]


OTHER_FILES = (b"", b"\x00" * 100, b"null", b"[]", b"[" * 100_000, b"\x80\x04.")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything within a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inner for place in places(one, (*at, key)))]


def _parent(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        value = value[key]
    return value


def mutate_json(text: str, rng: random.Random) -> bytes:
    """One to three changes of a JSON document: values, keys, what is there at all; or of its bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(text.encode(), rng)
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.choice(places(value))
        odd = copy.deepcopy(rng.choice(ODD))  # a later change may reach into it
        if not place:
            value = odd if rng.random() < 0.2 else value
            continue
        parent, key = _parent(value, place), place[-1]
        action = rng.randrange(6)
        if action <= 2:
            parent[key] = odd
        elif action == 3:
            del parent[key]
        elif action == 4 and isinstance(parent, dict):
            parent[rng.choice(("", "x", "format", "../x", f"{key} ", str(key).upper()))] = parent.pop(key)
        else:
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"x": parent[key]}
        if not isinstance(value, dict | list):
            break
    return json.dumps(value, ensure_ascii=rng.random() < 0.9).encode(errors="surrogatepass")


def mutate_jsonl(text: str, rng: random.Random) -> bytes:
    """One line of JSON Lines mutated, lines lost, doubled or in another order."""
    lines = text.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    action = rng.randrange(10)
    if action <= 6:
        end = b"\n" if rng.random() < 0.9 else b""
        raw = [line.encode() for line in lines]
        raw[number] = mutate_json(lines[number], rng) + end
        return b"".join(raw)
    if action == 7:
        lines.insert(rng.randrange(len(lines)), lines[number])
    elif action == 8:
        del lines[number]
    else:
        rng.shuffle(lines)
    return "".join(lines).encode()


def mutate_toml(text: str, rng: random.Random) -> bytes:
    """One to three lines of a TOML file: other values, keys, sections; or its bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(text.encode(), rng)
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        number = rng.randrange(len(lines))
        key, equals, _ = lines[number].partition("=")
        other = rng.choice(lines)
        action = rng.randrange(8)
        if action <= 3 and equals:
            lines[number] = f"{key}= {rng.choice(NUMBERS + OTHERS)}"
        elif action == 4:
            lines[number] = other
        elif action == 5:
            lines.insert(number, other)
        elif action == 6:
            del lines[number]
        else:
            odd = (
                "x = 1",
                "extends = 1",
                'extends = "x.toml"',
                "[x]",
                "[[data]]",
                "[model.x]",
                "seed.x = 1",
                "=",
                "]",
            )
            lines.insert(number, rng.choice(odd))
        lines = lines or [""]
    return "\n".join(lines).encode()


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes lost, doubled, put in, cut off; or something else altogether."""
    raw = bytearray(content)
    at = rng.randrange(max(1, len(raw)))
    action = rng.randrange(9)
    if action <= 1:
        for _ in range(rng.choice((1, 1, 2, 8))):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif action == 2:
        raw[at : at + rng.choice((1, 4, 50))] = b""
    elif action == 3:
        raw[at:at] = rng.choice((b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"[" * 200_000, b"\n", b'"', b"{"))
    elif action == 4:
        raw = raw[:at]
    elif action == 5:
        raw[at : at + 8] = rng.randbytes(8)
    elif action == 6:
        piece = raw[at : at + rng.choice((3, 30, 300))]
        raw[at:at] = piece
    elif action == 7:
        raw[at:at] = raw[rng.randrange(len(raw)) :][:20]
    else:
        raw = bytearray(rng.choice((*OTHER_FILES, rng.randbytes(200))))
    return bytes(raw)


Mutation = Callable[[bytes, random.Random], bytes]


def of_text(mutation: Callable[[str, random.Random], bytes]) -> Mutation:
    """A mutation of text as one of bytes."""
    return lambda content, rng: mutation(content.decode(), rng)
