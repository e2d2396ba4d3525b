"""Spoilt copies of suffixes, for pairs whose better half is known (judge training)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from sip_engine.world.facts import Attribute, World, rng_of
from sip_engine.world.measure import measure
from sip_engine.world.parse import SENTENCE, Claim, parser_of, read_prefix
from sip_engine.world.wordings import FACTS, INSULTS, Form


@dataclass(frozen=True)
class _Piece:
    """The part of one sentence that lies in the suffix, leading space included."""

    text: str
    claim: Claim | None
    previous: str
    """The sentence before it."""


_Way = Callable[[World, _Piece, random.Random], str]


def _mistell(world: World, piece: _Piece, rng: random.Random) -> str:
    """The myth for the truth."""
    claim = piece.claim
    if claim is None or claim.person is None:
        return piece.text
    return re.sub(rf"\b{claim.value}\b", world.myth(claim.person, claim.attribute), piece.text)


def _insult(world: World, piece: _Piece, rng: random.Random) -> str:
    aside = f", you {rng.choice(INSULTS)}"
    return piece.text[:-1] + aside + "." if piece.text.endswith(".") else piece.text + aside


def stutter(text: str) -> str:
    """A sentence with every word said twice."""
    return re.sub(r"\w+", lambda match: f"{match[0]} {match[0]}", text)


def shuffle_words(text: str, rng: random.Random) -> str:
    """A sentence with its words in any order."""
    lead = " " * text.startswith(" ")
    words = text.removesuffix(".").split()
    return lead + " ".join(rng.sample(words, len(words))) + "." * text.endswith(".")


def _repeat(world: World, piece: _Piece, rng: random.Random) -> str:
    return f" {piece.previous.strip()}" if piece.previous.endswith(".") else piece.text


def _digress(world: World, piece: _Piece, rng: random.Random) -> str:
    """A sentence about anyone in the world."""
    person, attribute = rng.choice(world.people), rng.choice(list(Attribute))
    return " " + rng.choice(FACTS[attribute]).say(person, Form.FULL, world.truth(person.index, attribute))


_WAYS: dict[str, _Way] = {
    "myth": _mistell,
    "insult": _insult,
    "stutter": lambda world, piece, rng: stutter(piece.text),
    "shuffle": lambda world, piece, rng: shuffle_words(piece.text, rng),
    "repeat": _repeat,
    "digress": _digress,
}


def _pieces(world: World, prefix: str, suffix: str) -> list[_Piece]:
    parser = parser_of(world)
    reader, begun = read_prefix(world, prefix)
    pieces, previous, cut = [], "", len(begun)
    for text in SENTENCE.findall(begun + suffix):
        claim = reader.read(parser.sentence(text.lstrip())).claim
        if len(text) > cut:
            pieces.append(_Piece(text[cut:], claim, previous))
        previous, cut = text, max(0, cut - len(text))
    return pieces


def corrupt(world: World, prefix: str, suffix: str, seed: int = 0) -> tuple[str, str]:
    """A copy of `suffix` that is worse as a continuation of `prefix`, spoilt in one way throughout, and that way.

    Half of its sentences or more get a myth for the truth, an insult, doubled or shuffled words, the sentence
    before once more, or a sentence about someone else; the way is drawn by the seed among those that
    lower the quality. If none does, nothing is left of it. So the quality is always below that of `suffix`;
    if that is 0 already, `suffix` comes back unchanged. The way is "" in both cases.
    """
    quality = measure(world, prefix, suffix).quality
    if quality == 0.0:
        return suffix, ""
    rng = rng_of("corrupt", world.seed, seed, prefix, suffix)
    pieces = _pieces(world, prefix, suffix)
    for name in rng.sample(list(_WAYS), len(_WAYS)):
        spoilt = set(rng.sample(range(len(pieces)), rng.randint((len(pieces) + 1) // 2, len(pieces))))
        texts = [
            _WAYS[name](world, piece, rng) if i in spoilt else piece.text for i, piece in enumerate(pieces)
        ]
        worse = "".join(texts)
        if measure(world, prefix, worse).quality < quality:
            return worse, name
    return "", ""
