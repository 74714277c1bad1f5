"""Interleaved stories: pictures that change from one to the next, told with references to earlier ones.

A story is about a person of the invented world, so that what is learned from text helps here, and about one
kind of scene. What a sentence says about a change ("the circle turned from red to green") needs the picture
just shown and one shown before.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from megamm.data.scenes import world
from megamm.data.scenes.captions import PLACES, alike, big, caption_of, colours_but, place, plural
from megamm.data.scenes.scene import BACKGROUNDS, DIGITS, SHAPES, Object, Scene, jitter, look

SKILLS = {"change": 0.6, "more": 0.25, "add": 0.15}
"""Name -> share of stories.

change: one big object changes its place, colour, shape or background, or all is again as in picture 1.
more: the number of small objects grows or shrinks. add: two digits, then their sum.
"""

NUM_PICTURES = {2: 0.5, 3: 0.3, 4: 0.2}
"""Number of pictures -> share of the stories of changing objects or numbers; a sum has 3."""

COUNTS = (2, 3, 4, 5, 6)

Step = tuple[Scene, str]
"""A picture and what is said after it."""


def draw_story(rng: random.Random) -> list[str | Scene]:
    """Draw a story: text and scenes in order, with 30 to 90 words and 2 to 4 pictures."""
    person = world.draw_person(rng)
    skill = rng.choices(tuple(SKILLS), tuple(SKILLS.values()))[0]
    steps = TELL[skill](rng)
    spans: list[str | Scene] = []
    told = world.sentence(person, rng.sample(("home", "food", "pet", "work"), 2))
    for number, (scene, told_next) in enumerate(steps, 1):
        spans += [f"{told} picture {number}:", scene]
        told = told_next
    return [*spans, f"{told} {_liking(person, steps[-1][0])}"]


def _liking(person: int, scene: Scene) -> str:
    """Say which colour a person likes, and whether the scene shows it."""
    colour = world.fact(person, "colour")
    shown = {scene.background, *(item.colour for item in scene.objects)}
    return f"{world.person_name(person)} likes {colour}, {'here it is' if colour in shown else 'not here'}."


def _captioned(rng: random.Random, skill: str, background: str, *objects: Object) -> Step:
    scene = Scene(skill=skill, background=background, objects=objects, **look(rng))
    return scene, caption_of(scene, frame=rng.randrange(2))


def _draw_num_pictures(rng: random.Random) -> int:
    return rng.choices(tuple(NUM_PICTURES), tuple(NUM_PICTURES.values()))[0]


def _tell_change(rng: random.Random) -> list[Step]:
    background = rng.choice(BACKGROUNDS)
    steps = [_captioned(rng, "big", background, big(rng, background))]
    first = steps[0][0]
    for _ in range(_draw_num_pictures(rng) - 1):
        scene = steps[-1][0]
        changes = [_move, _turn, _become, _change_background]
        # Otherwise it would be true already, and say nothing.
        if _facts(scene) != _facts(first):
            changes.append(lambda rng, scene: (first, "all is again as in picture 1."))
        changed, told = rng.choice(changes)(rng, scene)
        # Drawn anew for each picture, so that equal facts do not have equal pixels.
        item = replace(changed.objects[0], **jitter(rng))
        steps.append((replace(changed, objects=(item,), **look(rng)), told))
    return steps


def _facts(scene: Scene) -> tuple[str, str, str, str]:
    """What is said of a scene with one big object."""
    item = scene.objects[0]
    return scene.background, item.colour, item.shape, place(item)


def _move(rng: random.Random, scene: Scene) -> Step:
    item = scene.objects[0]
    places = [(r, c) for r in range(len(PLACES)) for c in range(len(PLACES)) if (r, c) != (item.row, item.column)]
    row, column = rng.choice(places)
    moved = replace(item, row=row, column=column)
    told = f"the {item.shape} moved from the {place(item)} to the {place(moved)}."
    return replace(scene, objects=(moved,)), told


def _turn(rng: random.Random, scene: Scene) -> Step:
    item = scene.objects[0]
    colour = rng.choice(colours_but(item.colour))
    told = f"the {item.shape} turned from {item.colour} to {colour}."
    return replace(scene, objects=(replace(item, colour=colour),)), told


def _become(rng: random.Random, scene: Scene) -> Step:
    item = scene.objects[0]
    shape = rng.choice([shape for shape in SHAPES if shape != item.shape])
    return replace(scene, objects=(replace(item, shape=shape),)), f"the {item.shape} became a {shape}."


def _change_background(rng: random.Random, scene: Scene) -> Step:
    colour = rng.choice([other for other in BACKGROUNDS if other != scene.background])
    told = f"the background turned from {scene.background} to {colour}."
    return replace(scene, background=colour), told


def _tell_more(rng: random.Random) -> list[Step]:
    background = rng.choice(BACKGROUNDS)
    shape, colour = rng.choice(SHAPES), rng.choice(colours_but(background))
    counts = [rng.choice(COUNTS)]
    steps = [_captioned(rng, "count", background, *alike(rng, shape, colour, counts[0]))]
    for _ in range(_draw_num_pictures(rng) - 1):
        count = rng.choice([n for n in COUNTS if n != counts[-1]])
        reference = rng.randrange(len(counts))
        difference = count - counts[reference]
        if difference:
            than = f"{abs(difference)} {'more' if difference > 0 else 'less'} than"
        else:
            than = "as many as"
        scene, _ = _captioned(rng, "count", background, *alike(rng, shape, colour, count))
        steps.append((scene, f"{count} {plural(shape)}, {than} in picture {reference + 1}."))
        counts.append(count)
    return steps


def _tell_add(rng: random.Random) -> list[Step]:
    total = rng.randint(0, 9)
    part = rng.randint(0, total)  # both digits and their sum have one digit
    steps = []
    for digit in (part, total - part, total):
        background = rng.choice(BACKGROUNDS)
        item = replace(big(rng, background), shape=DIGITS[digit])
        steps.append(_captioned(rng, "digit", background, item))
    told = f"{part} plus {total - part} is {total}, as in picture 1 and picture 2."
    return [*steps[:2], (steps[2][0], told)]


TELL: dict[str, Callable[[random.Random], list[Step]]] = {
    "change": _tell_change,
    "more": _tell_more,
    "add": _tell_add,
}
