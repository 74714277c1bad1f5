"""Documents without pictures: facts of the invented world, and patterns that follow from a rule.

The facts make a power law of things to remember (:mod:`world`); the rules reward a larger model in another
way, by what it can work out from the words before.
"""

import random

from megamm.data.scenes import world

SKILLS = {"facts": 0.56, "sums": 0.14, "copy": 0.10, "sort": 0.10, "tally": 0.10}
"""Name -> share of documents.

facts: people, each often a friend of the one before. sums: additions and subtractions. copy: words said again
in the same order. sort: numbers put in order. tally: how often each of two words was said.
"""

WORDS = (*world.CHOICES["food"], *world.CHOICES["pet"], *world.CHOICES["colour"])

NUM_SENTENCES = {"facts": (3, 6), "sums": (5, 12), "copy": (3, 5), "sort": (3, 5), "tally": (3, 5)}
"""Skill -> least and largest number of sentences of a document."""

NUM_FACTS = (2, 4)
NUM_WORDS = (3, 7)
NUM_NUMBERS = (3, 6)
TIMES = (1, 5)
PLUS_SHARE = 0.7


def draw_text(rng: random.Random) -> list[str]:
    """Draw a document of 20 to 120 words."""
    skill = rng.choices(tuple(SKILLS), tuple(SKILLS.values()))[0]
    count = rng.randint(*NUM_SENTENCES[skill])
    if skill == "facts":
        return [" ".join(_facts(rng, count))]
    return [" ".join(DRAW_SENTENCE[skill](rng) for _ in range(count))]


def _facts(rng: random.Random, count: int) -> list[str]:
    sentences, person = [], world.draw_person(rng)
    for _ in range(count):
        attributes = rng.sample(tuple(world.CLAUSES), rng.randint(*NUM_FACTS))
        sentences.append(world.sentence(person, attributes))
        person = world.friend(person) if "friend" in attributes else world.draw_person(rng)
    return sentences


def _sum(rng: random.Random) -> str:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < PLUS_SHARE:
        return f"{a} plus {b} is {a + b}."
    return f"{max(a, b)} minus {min(a, b)} is {abs(a - b)}."


def _copy(rng: random.Random) -> str:
    words = " ".join(rng.sample(WORDS, rng.randint(*NUM_WORDS)))
    return f"say {words}, again {words}."


def _sort(rng: random.Random) -> str:
    numbers = rng.sample(range(10), rng.randint(*NUM_NUMBERS))
    return f"sort {' '.join(map(str, numbers))} to get {' '.join(map(str, sorted(numbers)))}."


def _tally(rng: random.Random) -> str:
    pair, times = rng.sample(WORDS, 2), (rng.randint(*TIMES), rng.randint(*TIMES))
    words = [word for word, count in zip(pair, times) for _ in range(count)]
    rng.shuffle(words)
    # The word said first is named first.
    first, second = dict.fromkeys(words)
    return f"count {' '.join(words)}, that is {words.count(first)} {first} and {words.count(second)} {second}."


DRAW_SENTENCE = {"sums": _sum, "copy": _copy, "sort": _sort, "tally": _tally}
