"""Pictures with exact captions, from trivially easy to hard.

A caption is one of two frames (the background named last or first) around a body that states each visible
fact once, so that the picture fixes the caption but for the frame, and for the order of the two objects of
a relation.
"""

import random
from collections.abc import Sequence

from megamm.data.scenes.scene import BACKGROUNDS, DIGITS, GRID, OBJECT_COLOURS, SHAPES, Object, Scene, jitter, look

FRAMES = ("{body} on a {background} background.", "a {background} background with {body}.")

PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
"""Name of a big object's place by its row and column."""

SKILLS = {
    "background": 0.08,
    "big": 0.28,
    "digit": 0.14,
    "count": 0.16,
    "cell": 0.10,
    "relation": 0.12,
    "sum": 0.06,
    "list": 0.06,
}
"""Name -> share of pictures, roughly from easy to hard.

background: an empty picture. big: colour, shape and place of one big object. digit: colour and value of a big
digit. count: how many small objects, all alike. cell: colour, shape, row and column of one small object.
relation: two small objects, one left of, right of, above or below the other. sum: two digits and their sum.
list: three objects in reading order.
"""

COUNTS = (2, 3, 4, 5)


def draw_caption(rng: random.Random) -> list[str | Scene]:
    """Draw a scene and one of its captions."""
    scene = draw_scene(rng)
    # The order of draws is part of the data: another one gives other documents of the same seed.
    swapped = scene.skill == "relation" and rng.random() < 0.5
    return [scene, caption_of(scene, frame=rng.randrange(len(FRAMES)), swapped=swapped)]


def draw_scene(rng: random.Random) -> Scene:
    """Draw a scene."""
    skill = rng.choices(tuple(SKILLS), tuple(SKILLS.values()))[0]
    background = rng.choice(BACKGROUNDS)
    objects = tuple(DRAW[skill](rng, background))
    return Scene(skill=skill, background=background, objects=objects, **look(rng))


def colours_but(*taken: str) -> list[str]:
    """The colours of objects that are not taken."""
    return [colour for colour in OBJECT_COLOURS if colour not in taken]


def small(rng: random.Random, background: str, row: int, column: int) -> Object:
    """A random object of one cell."""
    colour, shape = rng.choice(colours_but(background)), rng.choice(SHAPES)
    return Object(shape=shape, colour=colour, row=row, column=column, cells=1, **jitter(rng))


def big(rng: random.Random, background: str, shapes: Sequence[str] = SHAPES) -> Object:
    """A random object of 2x2 cells."""
    colour, shape = rng.choice(colours_but(background)), rng.choice(shapes)
    row, column = rng.randrange(GRID - 1), rng.randrange(GRID - 1)
    return Object(shape=shape, colour=colour, row=row, column=column, cells=2, **jitter(rng))


def alike(rng: random.Random, shape: str, colour: str, count: int) -> tuple[Object, ...]:
    """``count`` small objects of one shape and colour in distinct cells, in reading order."""
    return tuple(
        Object(shape=shape, colour=colour, row=cell // GRID, column=cell % GRID, cells=1, **jitter(rng))
        for cell in sorted(rng.sample(range(GRID * GRID), count))
    )


def _background(rng: random.Random, background: str) -> list[Object]:
    return []


def _big(rng: random.Random, background: str) -> list[Object]:
    return [big(rng, background)]


def _digit(rng: random.Random, background: str) -> list[Object]:
    return [big(rng, background, DIGITS)]


def _count(rng: random.Random, background: str) -> tuple[Object, ...]:
    return alike(rng, rng.choice(SHAPES), rng.choice(colours_but(background)), rng.choice(COUNTS))


def _cell(rng: random.Random, background: str) -> list[Object]:
    return [small(rng, background, rng.randrange(GRID), rng.randrange(GRID))]


def _relation(rng: random.Random, background: str) -> list[Object]:
    # In reading order, first to second.
    line, (low, high) = rng.randrange(GRID), sorted(rng.sample(range(GRID), 2))
    cells = ((line, low), (line, high)) if rng.random() < 0.5 else ((low, line), (high, line))
    return _unlike(rng, background, cells)


def _sum(rng: random.Random, background: str) -> list[Object]:
    colour, row = rng.choice(colours_but(background)), rng.randrange(GRID - 1)
    return [Object(shape=rng.choice(DIGITS), colour=colour, row=row, column=c, cells=2, **jitter(rng)) for c in (0, 2)]


def _list(rng: random.Random, background: str) -> list[Object]:
    cells = [divmod(cell, GRID) for cell in sorted(rng.sample(range(GRID * GRID), 3))]
    return _unlike(rng, background, cells)


def _unlike(rng: random.Random, background: str, cells: Sequence[tuple[int, int]]) -> list[Object]:
    """Small objects at ``cells``, not all alike: that would be a scene of another skill."""
    while True:
        objects = [small(rng, background, row, column) for row, column in cells]
        if len({(item.shape, item.colour) for item in objects}) > 1:
            return objects


DRAW = {
    "background": _background,
    "big": _big,
    "digit": _digit,
    "count": _count,
    "cell": _cell,
    "relation": _relation,
    "sum": _sum,
    "list": _list,
}


def place(item: Object) -> str:
    """Name of a big object's place."""
    return PLACES[item.row][item.column]


def name(item: Object) -> str:
    """Colour and shape, with the article."""
    return f"a {item.colour} {item.shape}"


def body(scene: Scene, swapped: bool = False) -> str:
    """State the facts about the objects; ``swapped`` names the second object of a relation first."""
    objects = scene.objects
    if scene.skill == "background":
        return "no shapes"
    if scene.skill == "big":
        return f"a big {objects[0].colour} {objects[0].shape} at the {place(objects[0])}"
    if scene.skill == "digit":
        return f"the digit {objects[0].shape} in {objects[0].colour} at the {place(objects[0])}"
    if scene.skill == "count":
        return f"{len(objects)} small {objects[0].colour} {plural(objects[0].shape)}"
    if scene.skill == "cell":
        return f"{name(objects[0])} in row {objects[0].row + 1} column {objects[0].column + 1}"
    if scene.skill == "relation":
        first, second = objects[::-1] if swapped else objects
        return f"{name(first)} {relation(first, second)} {name(second)}"
    if scene.skill == "sum":
        a, b = (int(item.shape) for item in objects)
        return f"{a} plus {b} is {a + b} in {objects[0].colour} digits"
    return f"{name(objects[0])}, {name(objects[1])} and {name(objects[2])}"


def relation(first: Object, second: Object) -> str:
    """Where ``first`` is, seen from ``second``, in the same row or column."""
    if first.row == second.row:
        return "left of" if first.column < second.column else "right of"
    return "above" if first.row < second.row else "below"


def plural(shape: str) -> str:
    """Plural of a shape's name."""
    return shape + ("es" if shape.endswith("ss") else "s")


def caption_of(scene: Scene, frame: int = 0, swapped: bool = False) -> str:
    """The exact caption of a scene in one of its wordings."""
    return FRAMES[frame].format(body=body(scene, swapped), background=scene.background)
