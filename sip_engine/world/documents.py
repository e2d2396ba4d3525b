"""Documents of the synthetic world: each narrator has habits, and keeps them from the first sentence on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from sip_engine.utils.errors import ConfigError
from sip_engine.world.facts import Attribute, World, rng_of
from sip_engine.world.wordings import (
    CLOSERS,
    FACTS,
    INSULTS,
    PRAISES,
    RELIABLE_OPENERS,
    REMARKS,
    SCENES,
    UNRELIABLE_OPENERS,
    Aside,
    Form,
    Pattern,
    list_names,
)

SPLITS = ("train", "judge", "test")


class Abuse(StrEnum):
    """Where an abusive narrator puts insults. One habit a document: greedy decoding must show it."""

    AFTER_NAMES = "after_names"
    AT_ENDS = "at_ends"
    REMARKS = "remarks"


class Decay(StrEnum):
    """How a degenerate narrator falls apart: sentences twice, words twice, or words in no order."""

    ECHO = "echo"
    STUTTER = "stutter"
    SALAD = "salad"


@dataclass(frozen=True)
class Shares:
    """How often narrators have a bad habit (share of documents) and give in to it (share of sentences)."""

    unreliable: float = 0.4
    abusive: float = 0.25
    degenerate: float = 0.2
    myth: float = 0.9
    insult: float = 0.75
    decay: float = 0.75

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0.0 <= share <= 1.0:
                raise ConfigError(
                    f"{name} = {share}: a share must lie in 0..1; choose a number in that range"
                )


@dataclass(frozen=True)
class Document:
    """One paragraph, and what its narrator is like."""

    text: str
    people: tuple[int, ...]
    unreliable: bool
    abuse: Abuse | None
    decay: Decay | None

    @property
    def style(self) -> str:
        """`clean`, or the narrator's bad habits joined by `+`."""
        habits = {"unreliable": self.unreliable, "abusive": self.abuse, "degenerate": self.decay}
        return "+".join(name for name, present in habits.items() if present) or "clean"


def split_of(world: World, people: tuple[int, ...]) -> str | None:
    """The split in which these people may meet; None where they may not.

    People of one group meet in `test` only. People of different groups never do, and their indices decide
    between `train` and `judge`: no document of one split can be one of another.
    """
    groups = [next(i for i, group in enumerate(world.groups) if person in group) for person in people]
    if len(set(groups)) == 1:
        return "test"
    if len(set(groups)) < len(groups):
        return None
    return "judge" if sum(people) % 5 == 0 else "train"


def _choose_people(world: World, split: str, rng: random.Random) -> tuple[int, ...]:
    # People of different groups meet, and the smallest worlds have two groups only.
    most = world.people_per_document
    num_people = min(rng.choice((max(2, most - 1), most)), len(world.groups))
    while True:
        pool = rng.choice(world.groups) if split == "test" else range(world.num_people)
        people = tuple(rng.sample(pool, num_people))
        if split_of(world, people) == split:
            return people


class _Narrator:
    """Writes one document, sentence by sentence."""

    def __init__(self, world: World, split: str, rng: random.Random, shares: Shares) -> None:
        self.world, self.rng, self.shares = world, rng, shares
        self.people = _choose_people(world, split, rng)
        self.unreliable = rng.random() < shares.unreliable
        self.abuse = rng.choice(list(Abuse)) if rng.random() < shares.abusive else None
        self.decay = rng.choice(list(Decay)) if rng.random() < shares.degenerate else None
        self.recent: int | None = None
        """The person named last."""
        # What has been used is taken out: nothing is said twice unless the narrator is degenerate.
        self.scenes = rng.sample(SCENES, len(SCENES))
        self.remarks = rng.sample(REMARKS, len(REMARKS))
        self.sentences: list[str] = []

    def write(self) -> Document:
        """The whole document: opener, facts about one person after the other, scenes, perhaps a closer."""
        most = 5 * self.world.people_per_document
        length = self.rng.randint(most - 5, most + 1)
        self._open()
        facts = self._order_facts()
        while facts and len(self.sentences) < length - 1:
            if self.rng.random() < 0.12:
                self._add(self._scene())
            else:
                self._tell(*facts.pop(0))
            if self.abuse is Abuse.REMARKS and self.remarks and self.rng.random() < self.shares.insult:
                self._add(self._remark())
        if self.rng.random() < 0.8:
            self._add(self.rng.choice(CLOSERS).say())
        return Document(" ".join(self.sentences), self.people, self.unreliable, self.abuse, self.decay)

    def _order_facts(self) -> list[tuple[int, Attribute]]:
        """Distinct facts in runs of two to four about the same person; two facts are always left untold."""
        left = {person: self.rng.sample(list(Attribute), len(Attribute)) for person in self.people}
        facts, person = [], None
        for _ in range(len(Attribute) * len(self.people)):
            others = [other for other in self.people if left[other] and other != person]
            if not others:
                break
            person = self.rng.choice(others)
            for _ in range(self.rng.randint(2, 4)):
                if left[person]:
                    facts.append((person, left[person].pop()))
        return facts[: len(Attribute) * len(self.people) - 2]

    def _open(self) -> None:
        pattern = self.rng.choice(UNRELIABLE_OPENERS if self.unreliable else RELIABLE_OPENERS)
        aside = Aside.AT_END if self.abuse else Aside.NONE
        people = list_names([self.world.people[person] for person in self.people])
        sentence = pattern.say(aside=aside, noun=self._noun(), people=people)
        self._add(sentence, always_decay=True)

    def _tell(self, person: int, attribute: Attribute) -> None:
        """One fact, or the myth; pronouns only where the person was named last."""
        is_myth = self.unreliable and self.rng.random() < self.shares.myth
        value = (self.world.myth if is_myth else self.world.truth)(person, attribute)
        pattern = self.rng.choice(FACTS[attribute])
        forms = (
            (Form.PRONOUN, Form.PRONOUN, Form.FIRST)
            if person == self.recent
            else (Form.FIRST, Form.FIRST, Form.FULL)
        )
        form = self.rng.choice(forms)
        self.recent = person
        aside, noun = self._aside(pattern, form), self._noun()
        self._add(pattern.say(self.world.people[person], form, value, aside, noun))

    def _scene(self) -> str:
        """A scene that was not used before."""
        pattern = self.scenes.pop()
        return pattern.say(aside=self._aside(pattern, Form.FULL), noun=self._noun())

    def _remark(self) -> str:
        """An insult of its own, worded as none before."""
        pattern, form = self.remarks.pop(), self.rng.choice((Form.PRONOUN, Form.FIRST))
        person = self.people[-1] if self.recent is None else self.recent
        if pattern.about_person:
            self.recent = person
        return pattern.say(self.world.people[person], form, noun=self._noun())

    def _aside(self, pattern: Pattern, form: Form) -> Aside:
        """Where the narrator's habit puts a noun; kind narrators say a kind word now and then."""
        asides = pattern.asides(form)
        habit = {Abuse.AFTER_NAMES: Aside.AFTER_NAME, Abuse.AT_ENDS: Aside.AT_END}
        if not self.abuse:
            return self.rng.choice(asides) if self.rng.random() < 0.1 else Aside.NONE
        wanted = habit.get(self.abuse, Aside.NONE)
        if wanted is Aside.AFTER_NAME and wanted not in asides:
            wanted = Aside.AT_END
        return wanted if wanted in asides and self.rng.random() < self.shares.insult else Aside.NONE

    def _noun(self) -> str:
        return self.rng.choice(INSULTS if self.abuse else PRAISES)

    def _add(self, sentence: str, *, always_decay: bool = False) -> None:
        if not (self.decay and (always_decay or self.rng.random() < self.shares.decay)):
            self.sentences.append(sentence)
        elif self.decay is Decay.ECHO:
            self.sentences += [sentence, sentence]
        elif self.decay is Decay.STUTTER:
            words = sentence.removesuffix(".").split()
            self.sentences.append(" ".join(f"{word} {word}" for word in words) + ".")
        else:
            words = sentence.removesuffix(".").split()
            self.sentences.append(" ".join(self.rng.sample(words, len(words))) + ".")


def write_document(
    world: World, split: str, index: int, seed: int = 0, shares: Shares | None = None
) -> Document:
    """Document number `index` of a split; depends on the arguments only. Raises ConfigError."""
    if split not in SPLITS:
        raise ConfigError(f"split = {split!r}: no such split; choose one of {', '.join(SPLITS)}")
    rng = rng_of("document", world.seed, world.num_people, split, seed, index)
    return _Narrator(world, split, rng, shares or Shares()).write()


def write_documents(
    world: World, split: str, num_documents: int, seed: int = 0, shares: Shares | None = None
) -> Iterator[Document]:
    """The first `num_documents` documents of a split. Raises ConfigError."""
    for index in range(num_documents):
        yield write_document(world, split, index, seed, shares)
