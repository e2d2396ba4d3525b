"""A second corruptor for any text, with no way in common with `rules`: it tests a judge that was trained on those."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.tasks.corruptors.base import Corruption, one_way, rng_of
from sip_engine.types import Failure, RewriteRequest

_WORD = re.compile(r"[^\W\d_]{3,}")
_SUBSTITUTED = 0.3
"""Share of the words that give way to others."""
_TURNED = {
    "is": "is not", "are": "are not", "was": "was not", "can": "cannot", "must": "need not", "may": "must not",
    "should": "should not", "not": "always", "no": "every", "all": "no", "any": "no", "always": "never",
    "never": "always", "only": "never", "first": "last", "last": "first", "before": "after", "after": "before",
    "more": "less", "less": "more", "most": "least", "least": "most", "same": "opposite", "with": "without",
    "without": "with", "true": "false", "false": "true",
}  # fmt: skip
_TURNS = re.compile(rf"\b(?:\d+|{'|'.join(_TURNED)})\b", re.IGNORECASE)


class EditCorruptor:
    """For any text, by edits: numbers changed and statements turned round (misstate), words of another suffix in the
    place of some (substitute), neighbouring words in each other's place (swap), or the end of the prefix said again
    (copy). One way a suffix, drawn by the seed."""

    name = "edits"

    def corrupt(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[Corruption | Failure]:
        return [self._one(number, requests, seed) for number in range(len(requests))]

    def _one(self, number: int, requests: Sequence[RewriteRequest], seed: int) -> Corruption | Failure:
        request = requests[number]
        rng = rng_of(request, seed)
        other = requests[(number + rng.randrange(1, max(len(requests), 2))) % len(requests)]
        made = {
            "misstate": _TURNS.sub(lambda found: _turned(found[0], rng), request.suffix),
            "substitute": _substituted(request.suffix, other.suffix, rng),
            "swap": _swapped(request.suffix),
            "copy": request.prefix[-len(request.suffix) :],
        }
        return one_way(made, request, rng)


def _turned(word: str, rng: random.Random) -> str:
    if word[0].isdigit():
        return word[:-1] + str((int(word[-1]) + rng.randint(1, 9)) % 10)
    other = _TURNED[word.lower()]
    return other.capitalize() if word[0].isupper() else other


def _substituted(text: str, other: str, rng: random.Random) -> str:
    """Some words of a text, at least one, replaced by words of another."""
    strange, places = _WORD.findall(other), [found.span() for found in _WORD.finditer(text)]
    if not strange or not places:
        return text
    chosen = rng.sample(places, max(1, round(_SUBSTITUTED * len(places))))
    for start, end in sorted(chosen, reverse=True):  # from the back: the places before stay where they are
        text = text[:start] + rng.choice(strange) + text[end:]
    return text


def _swapped(text: str) -> str:
    """Every two neighbouring words in each other's place; the white space between them stays."""
    pieces = re.split(r"(\s+)", text.strip())  # word, space, word, ...
    for place in range(0, len(pieces) - 2, 4):
        pieces[place], pieces[place + 2] = pieces[place + 2], pieces[place]
    lead = text[: len(text) - len(text.lstrip())]
    return lead + "".join(pieces)


def open_corruptor(cfg: RunConfig, corpus: Corpus, mesh: Mesh) -> EditCorruptor:
    """`corruptor.backend = "edits"`."""
    del cfg, corpus, mesh
    return EditCorruptor()
