"""An invented world that is the same for every seed: 400 people, some of them far better known than others.

Person number r, from 0 on, is drawn with probability proportional to 1 / (r + 1). Their six attributes
make 2,400 facts that follow from no rule and must be remembered: a larger model keeps more of them, a longer
run meets more of them.
"""

import bisect
import hashlib
import itertools
import math
import random

from megamm.data.scenes.scene import COLOURS

FIRST_NAMES = (
    *("ana", "ben", "cora", "dan", "eva", "finn", "gus", "hana", "ivo", "jon"),
    *("kim", "lea", "max", "nora", "otto", "pia", "ravi", "sam", "tess", "uma"),
)
LAST_NAMES = (
    *("bell", "cole", "dale", "ford", "hart", "hill", "hunt", "king", "lane", "lind"),
    *("moss", "nash", "page", "reed", "shaw", "stone", "vale", "west", "wolf", "york"),
)

CHOICES = {
    "home": (
        "the city",
        "the desert",
        "the forest",
        "the harbour",
        "the mountains",
        "the town",
        "the valley",
        "a boat",
        "a castle",
        "a farm",
        "a mill",
        "a tower",
    ),
    "food": ("bread", "cake", "corn", "fish", "nuts", "pears", "plums", "rice", "salad", "soup"),
    "pet": ("bird", "cat", "cow", "dog", "duck", "goat", "horse", "mouse", "pig", "sheep"),
    "work": ("baker", "cook", "doctor", "driver", "farmer", "judge", "nurse", "painter", "sailor", "singer"),
    "colour": tuple(COLOURS),
}
"""Attribute -> its values, all equally likely."""

CLAUSES = {
    "home": "lives in {}",
    "food": "eats {}",
    "pet": "has a {}",
    "work": "is a {}",
    "colour": "likes {}",
    "friend": "knows {}",
}
"""Attribute -> how it is said of a person."""

NUM_PEOPLE = len(FIRST_NAMES) * len(LAST_NAMES)
EXPONENT = 1.0
_CUMULATIVE = list(itertools.accumulate((r + 1) ** -EXPONENT for r in range(NUM_PEOPLE)))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


# By hash: the well-known people must not all be called ana. sorted() and blake2b give the same on every machine.
_NAMES = sorted((f"{a} {b}" for a in FIRST_NAMES for b in LAST_NAMES), key=_hash)


def draw_person(rng: random.Random) -> int:
    """Draw the number of a person, the well-known ones more often."""
    # hi: rounding must not lead beyond the last person.
    return bisect.bisect(_CUMULATIVE, rng.random() * _CUMULATIVE[-1], hi=NUM_PEOPLE - 1)


def person_entropy() -> float:
    """Entropy of :func:`draw_person` in nats."""
    shares = [(r + 1) ** -EXPONENT / _CUMULATIVE[-1] for r in range(NUM_PEOPLE)]
    return -sum(share * math.log(share) for share in shares)


def person_name(person: int) -> str:
    """First and last name."""
    return _NAMES[person]


def friend(person: int) -> int:
    """The one person that ``person`` knows: another one, more often a well-known one."""
    other = draw_person(random.Random(_hash(f"friend {person}")))
    return other if other != person else (person + 1) % NUM_PEOPLE


def fact(person: int, attribute: str) -> str:
    """The value of an attribute of a person."""
    if attribute == "friend":
        return person_name(friend(person))
    values = CHOICES[attribute]
    # No table and no seed: the world is the same for every series.
    return values[_hash(f"{attribute} {person}") % len(values)]


def clause(person: int, attribute: str) -> str:
    """State a fact, without its subject."""
    return CLAUSES[attribute].format(fact(person, attribute))


def sentence(person: int, attributes: list[str]) -> str:
    """State facts about a person."""
    clauses = [clause(person, attribute) for attribute in attributes]
    head = ", ".join(clauses[:-1])
    return f"{person_name(person)} {head}{' and ' if head else ''}{clauses[-1]}."
