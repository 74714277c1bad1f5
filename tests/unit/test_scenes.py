"""The generator of procedural scenes: purity, exact captions, true stories."""

import io
import itertools
import re
from collections import Counter

import cv2
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.data import scenes
from megamm.data.documents import Image, Text
from megamm.data.scenes import captions, world
from megamm.data.scenes.scene import COLOURS, DIGITS, SHAPES, Object, Scene, render, visible_share
from megamm.errors import InputError

KINDS = ("caption", "interleaved", "text")
COLOUR, SHAPE = "|".join(COLOURS), "|".join(SHAPES)
PLACE = "|".join(sorted(itertools.chain(*captions.PLACES), key=len, reverse=True))
SIZE = 128


# ---- purity


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), index=st.integers(0, 10**9), seed=st.integers(0, 2**40))
def test_document_is_a_function_of_kind_seed_and_index(kind, index, seed):
    first = scenes.document(kind, index, seed, 32)
    scenes.document(kind, index + 1, seed, 32)
    assert scenes.document(kind, index, seed, 32) == first
    assert first.id == f"scenes-{kind}-{seed}-{index:06d}"
    assert first != scenes.document(kind, index, seed + 1, 32)
    assert first.spans != scenes.document(kind, index + 1, seed, 32).spans


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_a_prefix_whatever_the_number(kind):
    ten = list(scenes.generate_scenes(kind, 10, 3, 32))
    assert list(scenes.generate_scenes(kind, 4, 3, 32)) == ten[:4]
    assert scenes.document(kind, 9, 3, 32) == ten[9]


@pytest.mark.parametrize("size", [16, 32, 64, 224])
def test_images_have_the_size_asked_for_and_texts_do_not_depend_on_it(size):
    for kind in ("caption", "interleaved"):
        document, reference = scenes.document(kind, 5, 0, size), scenes.document(kind, 5, 0, 32)
        images = [span for span in document.spans if isinstance(span, Image)]
        assert images
        for image in images:
            decoded = PIL.Image.open(io.BytesIO(image.data))
            assert decoded.size == (size, size) and decoded.mode == "RGB"
        assert [s for s in document.spans if isinstance(s, Text)] == [s for s in reference.spans if isinstance(s, Text)]


def test_png_holds_the_rendered_pixels():
    scene, text = scenes.draw("caption", 11, 0)
    image, span = scenes.document("caption", 11, 0, 64).spans
    np.testing.assert_array_equal(PIL.Image.open(io.BytesIO(image.data)), render(scene, 64))
    assert span.text == text


@pytest.mark.parametrize("kind, size, named", [("captions", 32, "captions"), ("text", 30, "30"), ("text", 8, "8")])
def test_bad_arguments_are_refused_at_once(kind, size, named):
    with pytest.raises(InputError, match=named):
        scenes.generate_scenes(kind, 1, 0, size)


def test_words_are_few_and_documents_of_the_length_promised():
    seen, lengths = set(), {}
    for kind in KINDS:
        spans = [" ".join(s for s in scenes.draw(kind, i, 1) if isinstance(s, str)) for i in range(3000)]
        lengths[kind] = [len(text.split()) for text in spans]
        seen.update(*(re.findall(r"\S+", re.sub(r"[.,:]", " ", text)) for text in spans))
    names = {*world.FIRST_NAMES, *world.LAST_NAMES}
    things = {word for values in world.CHOICES.values() for value in values for word in value.split()}
    clauses = {word for clause in world.CLAUSES.values() for word in clause.replace("{}", "").split()}
    shapes = {*SHAPES, *map(captions.plural, SHAPES)}
    numbers = {str(n) for n in range(19)}
    frames = """
        a on background with no shapes big at the digit in digits small row column left right of above below top
        middle bottom plus minus is and picture moved from to turned became all again as than more less many likes
        here it not say sort get count that
    """
    rest = {word for line in frames.splitlines() for word in line.split()}
    assert seen <= names | things | clauses | shapes | numbers | rest
    assert len(seen) < 200
    assert min(lengths["caption"]) >= 6 and max(lengths["caption"]) <= 25
    assert min(lengths["interleaved"]) >= 30 and max(lengths["interleaved"]) <= 90
    assert min(lengths["text"]) >= 20 and max(lengths["text"]) <= 120


# ---- captions are exact: what they say is read back from the pixels


def classify(pixels):
    """Index of the nearest colour of each pixel."""
    palette = np.array(list(COLOURS.values()), np.float32)
    return (0.5 * (palette**2).sum(-1) - pixels.astype(np.float32) @ palette.T).argmin(-1)


def read_objects(pixels, background):
    """Objects found in a picture, each (shape, colour, row, column, cells), in reading order of their cells."""
    classes, names, cell = classify(pixels), list(COLOURS), len(pixels) // 4
    other = (classes != names.index(background)).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(other, connectivity=4)
    found = []
    for label in range(1, count):
        x, y, width, height, area = stats[label]
        if area < 12:
            continue
        cells = 2 if height > cell else 1
        inside = np.bincount(classes[labels == label], minlength=len(names))
        inside[names.index(background)] = 0
        row = round(y / cell) if cells == 2 else int((y + height / 2) // cell)
        # A big object is centred on the line between two columns; a narrow digit is not, but is in one of them.
        column = int((x + width / 2) // cell) if cells == 1 else round((x + width / 2) / cell) - 1
        found.append((label, names[int(inside.argmax())], row, column, cells))
    return [(identify(labels == label, r, c, n), colour, r, c, n) for label, colour, r, c, n in found]


def identify(mask, row, column, cells):
    """Shape or digit whose outline overlaps the object best."""
    cell = len(mask) // 4
    place = mask[row * cell : (row + cells) * cell, column * cell : (column + cells) * cell]
    candidates = SHAPES + tuple(DIGITS) if cells == 2 else SHAPES

    def overlap(shape):
        outlines = (visible_share(shape, len(place), (dx, dy), 0.82) > 0.5 for dx in (-1, 0, 1) for dy in (-1, 0, 1))
        return max((place & outline).sum() / (place | outline).sum() for outline in outlines)

    return max(candidates, key=overlap)


def read_caption(text):
    """Background and the fact of each sentence's body, as (skill, groups)."""
    frame = re.fullmatch(rf"a ({COLOUR}) background with (.*)\.", text)
    background, body = frame.groups() if frame else (None, None)
    if not frame:
        body, background = re.fullmatch(rf"(.*) on a ({COLOUR}) background\.", text).groups()
    patterns = {
        "background": "no shapes",
        "big": rf"a big ({COLOUR}) ({SHAPE}) at the ({PLACE})",
        "digit": rf"the digit (\d) in ({COLOUR}) at the ({PLACE})",
        "count": rf"(\d) small ({COLOUR}) (\w+)",
        "cell": rf"a ({COLOUR}) ({SHAPE}) in row (\d) column (\d)",
        "relation": rf"a ({COLOUR}) ({SHAPE}) (left of|right of|above|below) a ({COLOUR}) ({SHAPE})",
        "sum": rf"(\d) plus (\d) is (\d+) in ({COLOUR}) digits",
        "list": rf"a ({COLOUR}) ({SHAPE}), a ({COLOUR}) ({SHAPE}) and a ({COLOUR}) ({SHAPE})",
    }
    [(skill, groups)] = [(s, m.groups()) for s, p in patterns.items() if (m := re.fullmatch(p, body))]
    return background, skill, groups


def is_true(skill, said, objects):
    """Whether what the caption says holds for the objects read from the picture."""
    if skill == "background":
        return objects == []
    shape, colour, row, column, cells = objects[0]
    if skill in ("big", "digit"):
        what = (colour, shape) if skill == "big" else (shape, colour)
        return len(objects) == 1 and cells == 2 and said == (*what, captions.PLACES[row][column])
    if skill == "count":
        alike = {(shape, colour, cells) for shape, colour, _, _, cells in objects}
        return alike == {(shape, colour, 1)} and said == (str(len(objects)), colour, captions.plural(shape))
    if skill == "cell":
        return len(objects) == 1 and cells == 1 and said == (colour, shape, str(row + 1), str(column + 1))
    if skill == "sum":
        left, right = sorted(objects, key=lambda o: o[3])
        a, b = int(left[0]), int(right[0])
        return said == (str(a), str(b), str(a + b), colour) and left[1] == right[1]
    if skill == "list":
        ordered = sorted(objects, key=lambda o: o[2:4])
        return said == tuple(itertools.chain(*((o[1], o[0]) for o in ordered)))
    # relation: one of the two ways to match the objects makes the sentence true.
    for first, second in (objects, objects[::-1]):
        if said[:2] == (first[1], first[0]) and said[3:] == (second[1], second[0]):
            holds = {
                "left of": first[2] == second[2] and first[3] < second[3],
                "right of": first[2] == second[2] and first[3] > second[3],
                "above": first[3] == second[3] and first[2] < second[2],
                "below": first[3] == second[3] and first[2] > second[2],
            }
            return len(objects) == 2 and holds[said[2]]
    return False


def read_background(pixels):
    return list(COLOURS)[np.bincount(classify(pixels).ravel(), minlength=len(COLOURS)).argmax()]


def test_captions_are_true_of_the_pixels():
    skills = Counter()
    for index in range(200):
        scene, text = scenes.draw("caption", index, 2)
        pixels = render(scene, SIZE)
        background, skill, said = read_caption(text)
        assert background == read_background(pixels), text
        assert is_true(skill, said, read_objects(pixels, background)), text
        skills[skill] += 1
    assert set(skills) == set(captions.SKILLS)


def test_a_wrong_caption_is_found_out():
    by_skill = {}
    for index in range(600):
        scene, text = scenes.draw("caption", index, 4)
        by_skill.setdefault(scene.skill, []).append((scene, text))
    for skill, pairs in by_skill.items():
        false = 0
        for (scene, _), (_, text) in itertools.pairwise(pairs[:6]):
            background, _, said = read_caption(text)
            pixels = render(scene, SIZE)
            seen = read_background(pixels)
            false += background != seen or not is_true(skill, said, read_objects(pixels, seen))
        assert false >= 3, skill


def test_background_and_small_shapes_can_be_told_apart_at_32_pixels():
    right = 0
    for index in range(200):
        scene, _ = scenes.draw("caption", index, 6)
        pixels = render(scene, 32)
        assert read_background(pixels) == scene.background
        drawn = [(o.shape, o.colour, o.row, o.column, o.cells) for o in scene.objects]
        right += sorted(read_objects(pixels, scene.background)) == sorted(drawn)
    assert right > 150


@pytest.mark.parametrize("cells", [1, 2])
def test_every_shape_stays_in_its_place(cells):
    for shape in (*SHAPES, *DIGITS):
        item = Object(shape=shape, colour="red", row=1, column=1, cells=cells, shift=(1, -1), scale=0.86)
        scene = Scene(skill="big", background="white", objects=(item,), level=1.0, noise=0)
        rows, columns = np.nonzero(classify(render(scene, SIZE)) == 0)
        side = SIZE // 4
        assert rows.min() > side and columns.min() > side
        assert rows.max() < (1 + cells) * side - 1 and columns.max() < (1 + cells) * side - 1


# ---- stories


def test_stories_are_true():
    told = Counter()
    for index in range(250):
        spans = scenes.draw("interleaved", index, 3)
        pictures = [span for span in spans if isinstance(span, Scene)]
        assert 2 <= len(pictures) <= 4
        assert isinstance(spans[0], str) and spans[1::2] == pictures
        for number, text in enumerate(spans[0:-1:2], 1):
            assert text.endswith(f" picture {number}:")
        says = [re.sub(r" picture \d:$", "", text) for text in spans[2::2]]
        says[-1], liking = re.fullmatch(r"(.*\.) (\w+ \w+ likes .*)", says[-1]).groups()
        for number, sentence in enumerate(says):
            told[check_sentence(sentence, pictures, number)] += 1
        check_person(spans[0], liking, pictures[-1])
    assert set(told) == {"caption", "again", "moved", "turned", "became", "background", "number", "sum"}


def facts(scene):
    item = scene.objects[0]
    return {
        "background": scene.background,
        "colour": item.colour,
        "shape": item.shape,
        "place": captions.place(item),
    }


def check_sentence(sentence, pictures, number):
    """Check what is said after a picture against all pictures so far; returns the kind of sentence."""
    scene, first, before = pictures[number], pictures[0], pictures[max(number - 1, 0)]
    patterns = {
        "moved": (rf"the ({SHAPE}) moved from the ({PLACE}) to the ({PLACE})\.", "place"),
        "turned": (rf"the ({SHAPE}) turned from ({COLOUR}) to ({COLOUR})\.", "colour"),
        "became": (rf"the ({SHAPE}) became a ({SHAPE})\.", "shape"),
        "background": (rf"the background turned from ({COLOUR}) to ({COLOUR})\.", "background"),
    }
    for kind, (pattern, changed) in patterns.items():
        if match := re.fullmatch(pattern, sentence):
            old, new = facts(before), facts(scene)
            assert match.groups()[-2:] == (old[changed], new[changed]) and old[changed] != new[changed]
            assert {k for k in old if old[k] != new[k]} == {changed}
            assert kind == "background" or match.group(1) == old["shape"]
            return kind
    if sentence == "all is again as in picture 1.":
        assert facts(scene) == facts(first) != facts(before)
        return "again"
    if match := re.fullmatch(r"(\d) (\w+), (.*) in picture (\d)\.", sentence):
        count, shapes, than, reference = match.groups()
        then, now = len(pictures[int(reference) - 1].objects), len(scene.objects)
        assert int(count) == now and int(reference) <= number
        assert shapes == captions.plural(first.objects[0].shape)
        words = {0: "as many as", 1: f"{now - then} more than", -1: f"{then - now} less than"}
        assert than == words[int(np.sign(now - then))]
        return "number"
    if match := re.fullmatch(r"(\d) plus (\d) is (\d), as in picture 1 and picture 2\.", sentence):
        assert number == 2 and match.groups() == tuple(p.objects[0].shape for p in pictures)
        assert int(match.group(1)) + int(match.group(2)) == int(match.group(3))
        return "sum"
    pixels = render(scene, SIZE)
    background, skill, said = read_caption(sentence)
    assert background == read_background(pixels)
    assert is_true(skill, said, read_objects(pixels, background))
    return "caption"


def check_person(intro, liking, last):
    person = next(p for p in range(world.NUM_PEOPLE) if intro.startswith(world.person_name(p) + " "))
    assert len([a for a in world.CHOICES if world.clause(person, a) in intro]) == 2
    colour = world.fact(person, "colour")
    shown = colour in {read_background(render(last, SIZE)), last.objects[0].colour}
    assert liking == f"{world.person_name(person)} likes {colour}, {'here it is' if shown else 'not here'}."
