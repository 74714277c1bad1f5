"""The texts, the invented world and the table of difficulty of the scene generator."""

import itertools
import math
import random
import re
from collections import Counter

import pytest

from megamm.data import scenes
from megamm.data.scenes import captions, difficulty, stories, texts, world
from megamm.data.scenes.scene import BACKGROUNDS, DIGITS, SHAPES, Object, Scene


def test_texts_are_true():
    people = {world.person_name(p): p for p in range(world.NUM_PEOPLE)}
    assert len(people) == 400
    for index in range(1000):
        [text] = scenes.draw("text", index, 5)
        for sentence in re.findall(r"[^.]+\.", text):
            check_text(sentence.strip(), people)


def check_text(sentence, people):
    if match := re.fullmatch(r"(\d+) (plus|minus) (\d+) is (\d+)\.", sentence):
        a, sign, b, c = match.groups()
        assert int(a) + (1 if sign == "plus" else -1) * int(b) == int(c)
    elif match := re.fullmatch(r"say (.*), again (.*)\.", sentence):
        assert match.group(1) == match.group(2)
    elif match := re.fullmatch(r"sort (.*) to get (.*)\.", sentence):
        assert sorted(match.group(1).split(), key=int) == match.group(2).split()
    elif match := re.fullmatch(r"count (.*), that is (\d) (\w+) and (\d) (\w+)\.", sentence):
        words, n, a, m, b = match.groups()
        assert Counter(words.split()) == {a: int(n), b: int(m)} and words.startswith(a)
    else:
        name = " ".join(sentence.split()[:2])
        stated = re.split(r", | and ", sentence[len(name) + 1 : -1])
        known = {world.clause(people[name], attribute) for attribute in world.CLAUSES}
        assert 2 <= len(stated) <= 4 and set(stated) <= known


def test_people_follow_a_power_law_and_facts_do_not_depend_on_the_seed():
    rng = random.Random(0)
    counts = Counter(world.draw_person(rng) for _ in range(60000))
    for person in (1, 3, 7, 15):
        assert counts[0] / counts[person] == pytest.approx(person + 1, rel=0.15)
    assert min(counts) == 0 and max(counts) == world.NUM_PEOPLE - 1
    # The world is a part of the format of data made with it.
    assert [world.person_name(p) for p in range(2)] == ["hana cole", "ravi vale"]
    assert world.fact(0, "home") == "a tower"
    for values in world.CHOICES.values():
        assert len(set(values)) == len(values)


# ---- difficulty


def test_shares_are_as_stated():
    for kind, shares in (("caption", captions.SKILLS), ("interleaved", stories.SKILLS), ("text", texts.SKILLS)):
        assert sum(shares.values()) == pytest.approx(1)
        assert {s.name: s.share for s in scenes.skills() if s.kind == kind} == shares
    drawn = Counter(scenes.draw("caption", i, 8)[0].skill for i in range(6000))
    for skill, share in captions.SKILLS.items():
        assert drawn[skill] / 6000 == pytest.approx(share, abs=4 * math.sqrt(share / 6000))


def test_entropy_of_captions_is_that_of_their_enumeration():
    still = {"shift": (0, 0), "scale": 0.82}
    table = {s.name: s for s in scenes.skills() if s.kind == "caption"}

    def enumerate_(skill, make):
        scenes_ = [
            Scene(skill=skill, background=background, objects=objects, level=1.0, noise=0)
            for background in BACKGROUNDS
            for objects in make(captions.colours_but(background))
        ]
        texts_ = {
            captions.caption_of(scene, frame=frame, swapped=swapped)
            for scene in scenes_
            for frame in range(len(captions.FRAMES))
            for swapped in ((False, True) if skill == "relation" else (False,))
        }
        assert table[skill].without == pytest.approx(math.log(len(texts_)))

    def item(shape, colour, row=0, column=0, cells=1):
        return Object(shape=shape, colour=colour, row=row, column=column, cells=cells, **still)

    grid = list(itertools.product(range(3), range(3)))
    enumerate_("background", lambda colours: [()])
    enumerate_("big", lambda cs: [(item(s, c, *p, 2),) for s in SHAPES for c in cs for p in grid])
    enumerate_("digit", lambda cs: [(item(d, c, *p, 2),) for d in DIGITS for c in cs for p in grid])
    enumerate_("count", lambda cs: [(item(s, c),) * n for s in SHAPES for c in cs for n in captions.COUNTS])
    enumerate_("cell", lambda cs: [(item(s, c, i // 4, i % 4),) for s in SHAPES for c in cs for i in range(16)])
    enumerate_("sum", lambda cs: [(item(a, c), item(b, c, 0, 2)) for a in DIGITS for b in DIGITS for c in cs])


def test_entropies_of_text_are_those_of_large_samples():
    # Sums are few enough to estimate the entropy of a sentence from its counts.
    rng = random.Random(1)
    counts = Counter(texts.DRAW_SENTENCE["sums"](rng) for _ in range(40000))
    sampled = -sum(n / 40000 * math.log(n / 40000) for n in counts.values())
    asked, answer = difficulty._sums()
    assert asked == pytest.approx(sampled, abs=0.02) and answer > 1
    # Any other sentence: the floor is at most that without the rule, and the mean is between the skills'.
    table = [s for s in scenes.skills() if s.kind == "text"]
    assert all(0 < s.floor < s.without for s in table)
    without, floor = scenes.text_entropy()
    assert min(s.floor for s in table) < floor < without < max(s.without for s in table)


def test_the_picture_explains_most_of_a_caption():
    without, with_picture = scenes.caption_entropy()
    assert with_picture < 0.1 * without
    assert with_picture == pytest.approx(math.log(2) * (1 + captions.SKILLS["relation"]))
