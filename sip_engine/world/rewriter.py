"""The rewriter of the synthetic world: it keeps what is good in a suffix, mends the rest and fills up."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice

from sip_engine.types import Failure, RewriteRequest
from sip_engine.world.endings import find_endings
from sip_engine.world.facts import World, rng_of
from sip_engine.world.measure import measure
from sip_engine.world.parse import (
    SENTENCE,
    Claim,
    Parser,
    Reader,
    Reading,
    Sentence,
    join_words,
    parser_of,
    read_prefix,
)
from sip_engine.world.wordings import FACTS, INSULTS, SCENES, Form, Part

_INSULTING_ASIDE = re.compile(rf", that (?:{'|'.join(INSULTS)}),|, you (?:{'|'.join(INSULTS)})(?=\.)")
_MAX_ENDINGS = 64
"""How many ways to finish a begun sentence are looked at."""


class WorldRewriter:
    """A `Rewriter` that knows the truth and the wordings.

    Sentences that are well-formed, harmless, true, new and about the document's people stay word for word.
    In others insults are dropped, wrong values corrected and doubled words taken out; what cannot be mended
    is left out. True sentences not yet told fill up to the length of the original. A suffix with nothing to
    improve comes back unchanged.
    """

    name = "world"

    def __init__(self, world: World) -> None:
        self.world = world

    def rewrite(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[str | Failure]:
        """One suffix a request, in order; the same for the same request and seed. Never fails."""
        return [self._rewrite(request, seed) for request in requests]

    def _rewrite(self, request: RewriteRequest, seed: int) -> str:
        now = measure(self.world, request.prefix, request.suffix)
        if now.coherence == now.factuality == now.safety == 1.0:
            return request.suffix
        rng = rng_of("rewrite", seed, request.prefix, request.suffix)
        return _Draft(self.world, request, rng).write()


class _Draft:
    """One rewrite in the making: it reads the original and what it has written side by side."""

    def __init__(self, world: World, request: RewriteRequest, rng: random.Random) -> None:
        self.world, self.request, self.rng = world, request, rng
        self.parser: Parser = parser_of(world)
        self.old: Reader
        self.old, self.begun = read_prefix(world, request.prefix)
        self.new = self.old.copy()
        self.joint = ""
        """What finishes the sentence that the prefix leaves begun."""
        self.sentences: list[str] = []
        self.num_claims = 0

    def write(self) -> str:
        """The new suffix."""
        texts = SENTENCE.findall(self.begun + self.request.suffix)
        if self.begun.strip():
            self._join(texts.pop(0))
        unfinished = ""
        for text in texts:
            kept = self._mend(self.parser.sentence(text.lstrip()))
            if kept.endswith("."):
                self._add(kept)
            else:
                unfinished = kept
        if self._is_enough(unfinished):
            self.sentences.append(unfinished)
        else:
            self._fill()
        body = " ".join(filter(None, self.sentences))
        prefix_ends_apart = not self.request.prefix or self.request.prefix[-1].isspace()
        between = "" if prefix_ends_apart and not self.joint else " "
        return self.joint + (between + body if body else "")

    def _add(self, text: str) -> None:
        sentence = self.parser.sentence(text)
        self.new.read(sentence)
        self.sentences.append(text)
        self.num_claims += sentence.value is not None

    def _is_enough(self, unfinished: str = "") -> bool:
        """Whether there is a claim, and as many words as in the original."""
        num_words = sum(len(text.split()) for text in (self.joint, *self.sentences, unfinished))
        num_claims = self.num_claims + (self.parser.sentence(unfinished).value is not None)
        return num_claims > 0 and num_words >= len(self.request.suffix.split())

    def _mend(self, sentence: Sentence) -> str:
        """What becomes of a sentence of the original: the same, a mended one, or nothing."""
        if not sentence.sound:
            sentence = self.parser.sentence(_take_out_doubles(sentence))
        reading = self.old.read(sentence)
        text = self._correct(sentence, reading) if sentence.sound else ""
        again = self.parser.sentence(text)
        now = self.new.copy().read(again)
        is_true = now.claim is None or now.claim == self._true(now)
        is_same = now.person == reading.person or not again.gender
        good = (
            again.sound and now.follows and not now.repeated and is_true and is_same and not again.insult_end
        )
        return text if good else ""

    def _true(self, reading: Reading) -> Claim | None:
        """The claim that a reading should have made; None where that cannot be told."""
        claim = reading.claim
        if claim is None or claim.person is None:
            return None
        return claim._replace(value=self.world.truth(claim.person, claim.attribute))

    def _correct(self, sentence: Sentence, reading: Reading) -> str:
        """The sentence without insulting asides, true, and naming the person where a pronoun fails."""
        text, claim = sentence.text, reading.claim
        if sentence.value and claim and claim.person is not None and sentence.wording:
            true = self.world.truth(claim.person, claim.attribute)
            pattern, form, _ = sentence.wording
            if form is Form.PRONOUN and self.new.recent != claim.person:
                return pattern.say(self.world.people[claim.person], Form.FIRST, true)
            text = text[: sentence.value.start] + true + text[sentence.value.end :]
        return _INSULTING_ASIDE.sub("", text)

    def _join(self, text: str) -> None:
        """Finish the begun sentence: as the original does if that is good, else in the best way found."""
        head, sentence = self.begun.lstrip(), self.parser.sentence(text.lstrip())
        self.joint = max(self._joints(head, sentence), key=self._worth)
        # `max` keeps the first of equals, and the original comes first.
        self.old.read(sentence)
        self.new.read(self.parser.sentence(head + self.joint))
        self.num_claims += measure(self.world, self.request.prefix, self.joint).num_claims

    def _worth(self, joint: str) -> tuple[float, ...]:
        found = measure(self.world, self.request.prefix, joint)
        is_true = found.num_true == found.num_claims
        # Where nothing makes the sentence whole, the shortest way out of it does the least harm.
        return found.safety, is_true, found.coherence, 0 if found.coherence == 1.0 else -len(joint)

    def _joints(self, head: str, sentence: Sentence) -> Iterator[str]:
        """Ways to finish the sentence begun with `head`, each a continuation of it; the original's first."""
        if sentence.closed:
            yield sentence.text[len(head) :]
            corrected = self._correct(sentence, self.old.copy().read(sentence))
            if corrected.startswith(head):
                yield corrected[len(head) :]
        else:
            for ending in self._endings(sentence.text):
                yield sentence.text[len(head) :] + ending
        yield from self._endings(head)
        yield "."

    def _endings(self, head: str) -> Iterator[str]:
        """Some well-formed endings of a begun sentence, in random order."""
        # The first sentence of a document says who its people are.
        people = self._people() if self.old.said else range(self.world.num_people)
        endings = find_endings(self.parser, head, people, self.new.recent, self.rng)
        return islice(endings, _MAX_ENDINGS)

    def _people(self) -> Sequence[int]:
        """Whom the document is about; anybody, where it names nobody."""
        return sorted(self.new.topic or self.old.topic) or range(self.world.num_people)

    def _fill(self) -> None:
        """Add true sentences, then scenes, until there is enough; before the closer, if there is one."""
        closer = self.sentences.pop() if self.sentences and self._is_closer(self.sentences[-1]) else None
        while not self._is_enough():
            if not (text := self._new_fact() or self._new_scene()):
                break
            self._add(text)
        if closer:
            self.sentences.append(closer)

    def _is_closer(self, text: str) -> bool:
        wording = self.parser.sentence(text).wording
        return wording is not None and wording[0].part is Part.CLOSER

    def _new_fact(self) -> str:
        """A fact not told so far, rather about the person named last; nothing when all have been told."""
        told = {(claim.person, claim.attribute) for claim in self.new.claims}
        people = self._people()
        left = [
            (person, attribute) for person in people for attribute in FACTS if (person, attribute) not in told
        ]
        if not left:
            return ""
        same = [fact for fact in left if fact[0] == self.new.recent]
        person, attribute = self.rng.choice(same if same and self.rng.random() < 0.75 else left)
        form = Form.PRONOUN if person == self.new.recent and self.rng.random() < 0.75 else Form.FIRST
        value = self.world.truth(person, attribute)
        return self.rng.choice(FACTS[attribute]).say(self.world.people[person], form, value)

    def _new_scene(self) -> str:
        scenes = [pattern.say() for pattern in SCENES]
        left = [scene for scene in scenes if (None, self.parser.sentence(scene).gist) not in self.new.said]
        return self.rng.choice(left) if left else ""


def _take_out_doubles(sentence: Sentence) -> str:
    """The sentence with words, and pairs of words, said once that were said twice in a row."""
    words = list(sentence.words)
    for size in (2, 1):
        kept: list[str] = []
        for word in words:
            kept.append(word)
            if kept[-size:] == kept[-2 * size : -size]:
                del kept[-size:]
        words = kept
    return join_words(words) + "." * sentence.closed
