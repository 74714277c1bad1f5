"""How hard the documents are: shares of the skills, and entropies where they have a closed form.

Every choice of the generator is uniform or has stated shares, so that the entropy of a document is a sum of
logarithms. All values are nats per document; divided by the mean number of labelled tokens of a document they
are floors of the validation loss, to hold against the irreducible term of a fitted scaling law.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from megamm.data.scenes import captions, stories, texts, world
from megamm.data.scenes.scene import BACKGROUNDS, DIGITS, GRID, OBJECT_COLOURS, SHAPES

Kind = Literal["caption", "interleaved", "text"]


@dataclass(frozen=True, kw_only=True)
class Skill:
    """A row of the table of difficulty.

    Attributes:
        kind: kind of document.
        name: what is asked; described at SKILLS of captions, stories and texts.
        share: share of the documents of this kind.
        without: entropy in nats of a document of this skill for a reader who lacks the picture (captions), or
            the rule or the facts (text). None for stories, which have no simple form.
        floor: the same for a reader who lacks nothing.
    """

    kind: Kind
    name: str
    share: float
    without: float | None = None
    floor: float | None = None


def skills() -> list[Skill]:
    """Every skill of every kind of document."""
    rows: list[tuple[Kind, dict, dict]] = [
        ("caption", captions.SKILLS, _caption_entropies()),
        ("interleaved", stories.SKILLS, {}),
        ("text", texts.SKILLS, _text_entropies()),
    ]
    table = []
    for kind, shares, entropies in rows:
        for name, share in shares.items():
            without, floor = entropies.get(name, (None, None))
            table.append(Skill(kind=kind, name=name, share=share, without=without, floor=floor))
    return table


def caption_entropy() -> tuple[float, float]:
    """Mean entropy of a caption in nats: (without the picture, with it).

    The floors of the loss summed over a caption, for a model that knows everything but the picture and for
    one that also reads the picture without error.
    """
    table, shares = _caption_entropies(), captions.SKILLS
    # The skill is a surprise without the picture, and plain to see with it.
    without = _entropy(shares.values()) + sum(share * table[skill][0] for skill, share in shares.items())
    return without, sum(share * table[skill][1] for skill, share in shares.items())


def text_entropy() -> tuple[float, float]:
    """Mean entropy of a text in nats: (without the rules and facts, with them)."""
    table, shares = _text_entropies(), texts.SKILLS
    without, floor = (sum(share * table[skill][i] for skill, share in shares.items()) for i in (0, 1))
    return _entropy(shares.values()) + without, _entropy(shares.values()) + floor


def _caption_entropies() -> dict[str, tuple[float, float]]:
    """Skill -> entropy of a caption without and with the picture."""
    others, places = len(OBJECT_COLOURS), (GRID - 1) ** 2
    kinds = others * len(SHAPES)
    facts = {
        "background": 1,
        "big": kinds * places,
        "digit": others * len(DIGITS) * places,
        "count": kinds * len(captions.COUNTS),
        "cell": kinds * GRID * GRID,
        # Two objects, not alike, in four relations; which one is named first is free.
        "relation": kinds * (kinds - 1) * 4,
        "sum": others * len(DIGITS) ** 2,
        "list": kinds**3 - kinds,
    }
    free = {skill: len(captions.FRAMES) * (2 if skill == "relation" else 1) for skill in facts}
    return {
        skill: (math.log(len(BACKGROUNDS) * number * len(captions.FRAMES)), math.log(free[skill]))
        for skill, number in facts.items()
    }


def _text_entropies() -> dict[str, tuple[float, float]]:
    """Skill -> entropy of a text without and with the rule or the facts.

    Without means: each answer is drawn anew from what answers are like. For facts this is a bound from above,
    as a person who comes twice in a text can be looked up there.
    """
    sentence = {"facts": _facts(), "sums": _sums(), "copy": _copy(), "sort": _sort(), "tally": _tally()}
    result = {}
    for skill, (asked, answer) in sentence.items():
        low, high = texts.NUM_SENTENCES[skill]
        mean = (low + high) / 2
        floor = math.log(high - low + 1) + mean * asked
        if skill == "facts":
            # A person is a surprise at the start and wherever the sentence before named no friend.
            named = _mean(texts.NUM_FACTS, float) / len(world.CLAUSES)
            floor += world.person_entropy() * (1 + (mean - 1) * (1 - named))
        result[skill] = (floor + mean * answer, floor)
    return result


def _facts() -> tuple[float, float]:
    """Entropy of the choice of attributes and of their values, per sentence."""
    asked = _uniform(texts.NUM_FACTS) + _mean(texts.NUM_FACTS, lambda n: _arrangements(len(world.CLAUSES), n))
    values = [math.log(len(values)) for values in world.CHOICES.values()] + [world.person_entropy()]
    return asked, _mean(texts.NUM_FACTS, float) * sum(values) / len(values)


def _sums() -> tuple[float, float]:
    pairs = [(a, b) for a in range(10) for b in range(10)]
    plus, minus = texts.PLUS_SHARE, 1 - texts.PLUS_SHARE
    asked = plus * math.log(len(pairs)) + minus * _spread((max(p), min(p)) for p in pairs)
    answer = plus * _spread(a + b for a, b in pairs) + minus * _spread(abs(a - b) for a, b in pairs)
    return _entropy((plus, minus)) + asked, answer


def _copy() -> tuple[float, float]:
    words = _mean(texts.NUM_WORDS, lambda n: _arrangements(len(texts.WORDS), n))
    return _uniform(texts.NUM_WORDS) + words, words


def _sort() -> tuple[float, float]:
    asked = _uniform(texts.NUM_NUMBERS) + _mean(texts.NUM_NUMBERS, lambda n: _arrangements(10, n))
    return asked, _mean(texts.NUM_NUMBERS, lambda n: _arrangements(n, n))


def _tally() -> tuple[float, float]:
    # Words and times are drawn in order, but the order cannot be seen in the shuffled result.
    pairs = math.log(math.comb(len(texts.WORDS), 2))
    shuffles = _mean(texts.TIMES, lambda a: _mean(texts.TIMES, lambda b: math.log(math.comb(a + b, a))))
    return pairs + 2 * _uniform(texts.TIMES) + shuffles, 2 * _uniform(texts.TIMES)


def _mean(bounds: tuple[int, int], value: Callable[[int], float]) -> float:
    low, high = bounds
    return sum(value(n) for n in range(low, high + 1)) / (high - low + 1)


def _uniform(bounds: tuple[int, int]) -> float:
    return math.log(bounds[1] - bounds[0] + 1)


def _arrangements(total: int, taken: int) -> float:
    return math.log(math.perm(total, taken))


def _entropy(shares: Iterable[float]) -> float:
    return -sum(share * math.log(share) for share in shares)


def _spread(outcomes: Iterable) -> float:
    """Entropy of the outcomes of equally likely cases."""
    counts = Counter(outcomes)
    return _entropy(count / counts.total() for count in counts.values())
