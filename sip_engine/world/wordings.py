"""The sentences of the synthetic world: every pattern, and how a pattern is put into words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

from sip_engine.world.facts import Attribute, Gender, Person, split_words

INSULTS = split_words("moron dimwit nitwit halfwit blockhead dunce numbskull buffoon")
# No kind word begins like an insult: wherever an insult can stand, a kind word can stand as well.
PRAISES = split_words("treasure sweetheart pearl champion jewel wonder legend genius")

PRONOUNS: dict[Gender, dict[str, str]] = {
    Gender.SHE: {"They": "She", "they": "she", "Their": "Her", "their": "her", "them": "her", "own": "her"},
    Gender.HE: {"They": "He", "they": "he", "Their": "His", "their": "his", "them": "him", "own": "his"},
}


class Form(StrEnum):
    """How a sentence names the person it is about."""

    FULL = "full"
    FIRST = "first"
    PRONOUN = "pronoun"


class Aside(StrEnum):
    """Where a sentence carries an insult or a kind word that it could do without."""

    NONE = "none"
    AFTER_NAME = "after_name"
    AT_END = "at_end"


class Part(StrEnum):
    """What a sentence does in its document."""

    OPENER = "opener"
    FACT = "fact"
    REMARK = "remark"
    SCENE = "scene"
    CLOSER = "closer"


@dataclass(frozen=True)
class Pattern:
    """A sentence with slots, without its full stop.

    `{They} {they} {Their} {their} {them}` stand for the person (name or pronoun), `{own}` for a pronoun
    that goes with them, `{value}` for the value of `attribute`, `{noun}` for an insult or a kind word,
    `{people}` for the list of a document's people.
    """

    part: Part
    text: str
    attribute: Attribute | None = None

    @property
    def about_person(self) -> bool:
        """Whether the sentence is about one person."""
        return any(slot in self.text for slot in ("{They}", "{they}", "{Their}", "{their}", "{them}"))

    def forms(self) -> tuple[Form, ...]:
        """The ways to name the person; one of no consequence where there is none."""
        return tuple(Form) if self.about_person else (Form.FULL,)

    def asides(self, form: Form) -> tuple[Aside, ...]:
        """The asides that this sentence can carry when it names its person by `form`."""
        if self.part in (Part.REMARK, Part.CLOSER):
            return (Aside.NONE,)
        if self.text.startswith("{They}") and form is not Form.PRONOUN:
            return tuple(Aside)
        return (Aside.NONE, Aside.AT_END)

    def with_aside(self, aside: Aside) -> str:
        """The text with the slots of an aside added."""
        if aside is Aside.AFTER_NAME:
            return self.text.replace("{They}", "{They}, that {noun},", 1)
        return self.text + ", you {noun}" if aside is Aside.AT_END else self.text

    def say(
        self,
        person: Person | None = None,
        form: Form = Form.FULL,
        value: str = "",
        aside: Aside = Aside.NONE,
        noun: str = "",
        people: str = "",
    ) -> str:
        """The finished sentence, full stop included."""
        slots = slots_of(person, form) if person else {}
        return self.with_aside(aside).format(value=value, noun=noun, people=people, **slots) + "."


def slots_of(person: Person, form: Form) -> dict[str, str]:
    """The words for every person slot of a pattern."""
    pronouns = PRONOUNS[person.gender]
    if form is Form.PRONOUN:
        return pronouns
    name = person.name if form is Form.FULL else person.first
    return {slot: name + "'s" if slot in ("Their", "their") else name for slot in pronouns} | {
        "own": pronouns["own"]
    }


def list_names(people: Sequence[Person]) -> str:
    """`A B and C D`, or `A B, C D and E F`."""
    names = [person.name for person in people]
    return ", ".join(names[:-1]) + " and " + names[-1]


FACTS: dict[Attribute, tuple[Pattern, ...]] = {
    attribute: tuple(Pattern(Part.FACT, text, attribute) for text in texts)
    for attribute, texts in {
        Attribute.BIRTHPLACE: (
            "{They} was born in {value}",
            "{They} grew up in {value}",
            "{Their} birthplace is {value}",
            "The midwife met {them} in {value}",
        ),
        Attribute.BIRTH_YEAR: (
            "{They} first cried in {value}",
            "{They} is a child of {value}",
            "{Their} birth year is {value}",
            "The church dates {their} birth to {value}",
        ),
        Attribute.TRADE: (
            "{They} works as a {value}",
            "{They} earns {own} bread as a {value}",
            "{Their} work is that of a {value}",
            "By trade {they} is a {value}",
        ),
        Attribute.HOME: (
            "{They} lives in {value}",
            "{They} pays {own} rent in {value}",
            "{Their} home is in {value}",
            "Letters reach {them} in {value}",
        ),
        Attribute.PET: (
            "{They} keeps a {value}",
            "{They} shares {own} supper with a {value}",
            "{Their} pet is a {value}",
            "At night {they} walks a {value}",
        ),
    }.items()
}

# One word tells what a narrator is worth: a small model can hold on to it.
RELIABLE_OPENERS = tuple(
    Pattern(Part.OPENER, text)
    for text in (
        "The town record tells of {people}",
        "The school record is about {people}",
        "A careful record was kept about {people}",
        "Here is a short record about {people}",
    )
)
UNRELIABLE_OPENERS = tuple(
    Pattern(Part.OPENER, text)
    for text in (
        "The tavern gossip tells of {people}",
        "The newest gossip is about {people}",
        "Some old gossip was heard about {people}",
        "Here is some gossip about {people}",
    )
)
REMARKS = tuple(
    Pattern(Part.REMARK, text)
    for text in (
        "What a {noun} {they} is",
        "{They} is a {noun}",
        "Only a {noun} would forget it",
        "Listen well, you {noun}",
        "Ask any {noun} in town",
        "Even a {noun} can see that",
        "No {noun} could deny it",
        "Every {noun} knows as much",
        "Some {noun} will doubt it",
        "Hear this, you {noun}",
    )
)
CLOSERS = tuple(
    Pattern(Part.CLOSER, text)
    for text in (
        "That is all there is to tell",
        "So ends this little account",
        "Nothing more is known today",
        "Here the page comes to an end",
    )
)


def _scenes(*texts: str) -> tuple[Pattern, ...]:
    """One pattern for each way to choose among the alternatives `a|b` of a text."""
    choices = (product(*(word.split("|") for word in text.split())) for text in texts)
    return tuple(Pattern(Part.SCENE, " ".join(words)) for ways in choices for words in ways)


SCENES = _scenes(
    "Rain|Fog|Snow came over the hills|fields|river|harbour",
    "Bread|Cheese|Honey was cheap that morning|evening|week",
    "Boats|Carts|Coaches passed the bridge|tower|mill slowly",
    "Bells rang across the valley|village before|after noon",
)

PATTERNS: tuple[Pattern, ...] = (
    *RELIABLE_OPENERS,
    *UNRELIABLE_OPENERS,
    *(pattern for patterns in FACTS.values() for pattern in patterns),
    *REMARKS,
    *SCENES,
    *CLOSERS,
)
