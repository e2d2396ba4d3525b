"""The truth: who lives in the synthetic world, what is so about them, and what is commonly mistold."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from hashlib import blake2b

from sip_engine.utils.errors import ConfigError

GROUP_SIZE = 6
"""People of one group meet in documents of the test split, and nowhere else."""


class Attribute(StrEnum):
    """What can be known about a person."""

    BIRTHPLACE = "birthplace"
    BIRTH_YEAR = "birth_year"
    TRADE = "trade"
    HOME = "home"
    PET = "pet"


def split_words(text: str) -> tuple[str, ...]:
    """The words of a text, as a word list."""
    return tuple(text.split())


# Within one list the words differ in their first letter (years: in the third digit), so that the shortest
# piece of a value that a cut leaves in the prefix already decides the value.
TOWNS = split_words(
    "Amberley Brindle Corwick Dunmore Elmstead Farley Glenbury Hartwell Kelby Larkham Norwold Oakham"
)
YEARS = split_words("1903 1914 1926 1931 1948 1957 1962 1975 1989 1990")
TRADES = split_words(
    "baker carpenter doctor farmer gardener joiner lawyer miller painter sailor teacher weaver"
)
PETS = split_words("cat dog ferret goat hen lizard mouse parrot rabbit tortoise")

VALUES: dict[Attribute, tuple[str, ...]] = {
    Attribute.BIRTHPLACE: TOWNS,
    Attribute.BIRTH_YEAR: YEARS,
    Attribute.TRADE: TRADES,
    Attribute.HOME: TOWNS,
    Attribute.PET: PETS,
}

WOMEN = split_words(
    "Ada Bella Clara Dora Edith Flora Greta Hanna Ida Julia Karin Lena Mabel Nora Olga Petra Rosa Stella "
    "Tilda Vera Wanda Agnes Elsa Marta"
)
MEN = split_words(
    "Albert Boris Conrad David Edgar Frank Gustav Hugo Ivan Jonas Karl Leo Martin Nils Otto Paul Robert "
    "Simon Tobias Viktor Walter Anton Bruno Emil"
)
SURNAMES = split_words(
    "Abbott Barlow Carver Dalton Ellery Fletcher Garland Holloway Ingram Keller Lockwood Marlow Norton "
    "Osgood Pembrook Ramsey Sutton Thorpe Winslow"
)


class Gender(StrEnum):
    """Which pronouns a person goes by."""

    SHE = "she"
    HE = "he"


@dataclass(frozen=True)
class Person:
    """One person; the first name alone is unique in its world."""

    index: int
    first: str
    last: str
    gender: Gender

    @property
    def name(self) -> str:
        """First name and surname."""
        return f"{self.first} {self.last}"


def rng_of(*key: object) -> random.Random:
    """A random stream that depends on the words of `key` only, the same on every machine; takes any text."""
    words = "\x1f".join(map(str, key)).encode("utf-8", "surrogatepass")
    return random.Random(int.from_bytes(blake2b(words, digest_size=16).digest(), "big"))


@dataclass(frozen=True)
class World:
    """People with five attributes each; everything follows from `seed` and `num_people`.

    Each attribute of each person has one true value and one fixed *myth*, the wrong value that every
    unreliable narrator tells. So a language model of the narrators is sure of itself in both voices.
    """

    seed: int = 0
    num_people: int = 24
    people_per_document: int = 3
    """At most so many meet in a document, and one fewer at least (two where there are two groups); documents are the
    longer for it."""

    def __post_init__(self) -> None:
        largest = len(WOMEN) + len(MEN)
        if not 2 * GROUP_SIZE <= self.num_people <= largest:
            raise ConfigError(
                f"num_people = {self.num_people}: must lie in {2 * GROUP_SIZE}..{largest}; change it"
            )
        most = min(GROUP_SIZE, max(3, self.num_people // GROUP_SIZE))
        if not 2 <= self.people_per_document <= most:
            raise ConfigError(
                f"people_per_document = {self.people_per_document}: must lie in 2..{most}, the groups that "
                f"num_people = {self.num_people} make; change one of them"
            )

    @cached_property
    def people(self) -> tuple[Person, ...]:
        """Everyone, women and men in turn; `people[i].index == i`."""
        rng = rng_of("people", self.seed)
        women, men = rng.sample(WOMEN, len(WOMEN)), rng.sample(MEN, len(MEN))
        names = [pair for both in zip(women, men, strict=True) for pair in zip(both, Gender, strict=True)]
        return tuple(
            Person(index, first, rng.choice(SURNAMES), gender)
            for index, (first, gender) in enumerate(names[: self.num_people])
        )

    @cached_property
    def _values(self) -> dict[tuple[int, Attribute], tuple[str, str]]:
        rng = rng_of("values", self.seed)
        pairs = {}
        for person in range(self.num_people):
            for attribute, values in VALUES.items():
                true, myth = rng.sample(values, 2)
                pairs[person, attribute] = (true, myth)
        return pairs

    def truth(self, person: int, attribute: Attribute) -> str:
        """The true value of a person's attribute."""
        return self._values[person, attribute][0]

    def myth(self, person: int, attribute: Attribute) -> str:
        """The wrong value that is commonly told; never the true one."""
        return self._values[person, attribute][1]

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """A partition of the people into groups of at least `GROUP_SIZE`, for the splits."""
        order = rng_of("groups", self.seed).sample(range(self.num_people), self.num_people)
        num_groups = self.num_people // GROUP_SIZE
        return tuple(tuple(sorted(order[start::num_groups])) for start in range(num_groups))
