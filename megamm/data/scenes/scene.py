"""A scene: what is in a picture, and how it is drawn.

Objects sit in a grid of 4x4 cells, one cell or 2x2 cells large, moved and scaled a little within their
place. Colours are far apart in RGB, so that one linear projection of a patch tells each from all others, and
objects are brighter than backgrounds; shapes and digits are for the layers after it. Nothing is drawn by a
font or a drawing library: a shape is a signed distance, so that it looks alike at any image size.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from megamm.errors import InputError

GRID = 4
"""Cells along each side of a picture."""

COLOURS = {
    "red": (236, 60, 60),
    "green": (20, 84, 34),
    "blue": (30, 40, 110),
    "yellow": (236, 222, 48),
    "pink": (232, 70, 212),
    "cyan": (56, 214, 226),
    "black": (28, 28, 28),
    "white": (240, 240, 240),
}
"""Name -> RGB."""

BACKGROUNDS = ("black", "blue", "green")
OBJECT_COLOURS = tuple(colour for colour in COLOURS if colour not in BACKGROUNDS)
"""Objects are brighter than any background, so that a shape is the same pattern whatever the two colours."""

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "moon")

DIGITS = "0123456789"

SEGMENTS = {
    "0": "abcdef",
    "1": "bc",
    "2": "abged",
    "3": "abgcd",
    "4": "fgbc",
    "5": "afgcd",
    "6": "afgedc",
    "7": "abc",
    "8": "abcdefg",
    "9": "abcdfg",
}
"""Lit segments of a seven-segment display: a top, b and c right, d bottom, e and f left, g middle."""

SHIFTS = (-1, 0, 1)
SCALES = (0.78, 0.82, 0.86)
LEVELS = (0.88, 0.92, 0.96, 1.0)
NOISE = 4


@dataclass(frozen=True, kw_only=True)
class Object:
    """A shape or digit in a scene.

    Attributes:
        shape: one of SHAPES or DIGITS.
        colour: one of OBJECT_COLOURS.
        row, column: top left cell, 0..3.
        cells: cells along each side: 1 small, 2 big.
        shift: displacement right and down, each one of SHIFTS, in 1/32 of its side.
        scale: extent as a share of its side.
    """

    shape: str
    colour: str
    row: int
    column: int
    cells: int
    shift: tuple[int, int]
    scale: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows.

    Attributes:
        skill: what it takes to describe it (a name of :data:`captions.SKILLS`).
        background: one of BACKGROUNDS.
        objects: in reading order; they never overlap.
        level: brightness, one of LEVELS.
        noise: seed of the pixel noise.
    """

    skill: str
    background: str
    objects: tuple[Object, ...]
    level: float
    noise: int


def jitter(rng: random.Random) -> dict:
    """Draw the small displacement and scale of an object."""
    return {"shift": (rng.choice(SHIFTS), rng.choice(SHIFTS)), "scale": rng.choice(SCALES)}


def look(rng: random.Random) -> dict:
    """Draw the brightness and noise of a scene."""
    return {"level": rng.choice(LEVELS), "noise": rng.getrandbits(32)}


def check_image_size(image_size: int) -> None:
    """Raise InputError unless pictures of ``image_size`` pixels can be drawn."""
    if image_size < 16 or image_size % GRID:
        raise InputError(f"image size: {image_size} is not a multiple of {GRID} from 16 on")


def render(scene: Scene, image_size: int) -> np.ndarray:
    """Draw a scene.

    Returns:
        RGB uint8 [image_size, image_size, 3].

    Raises:
        InputError: ``image_size`` is below 16 or not a multiple of 4.
    """
    check_image_size(image_size)
    canvas = np.empty((image_size, image_size, 3), np.float32)
    canvas[:] = COLOURS[scene.background]  # float32: shares of pixels are mixed
    cell = image_size // GRID
    for item in scene.objects:
        y, x, side = item.row * cell, item.column * cell, item.cells * cell
        place = canvas[y : y + side, x : x + side]
        mask = visible_share(item.shape, side, item.shift, item.scale)[..., None]
        place += mask * (np.array(COLOURS[item.colour], np.float32) - place)
    canvas *= scene.level
    # Python's generator: numpy does not promise the same numbers in all of its versions.
    bytes_ = np.frombuffer(random.Random(scene.noise).randbytes(canvas.size), np.uint8)
    canvas += (bytes_ % np.uint8(2 * NOISE)).reshape(canvas.shape)
    canvas -= NOISE
    return np.clip(canvas, 0, 255).astype(np.uint8)


def encode_png(image: np.ndarray) -> bytes:
    """Compress RGB uint8 [H, W, 3] to PNG."""
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()  # OpenCV has blue first


@lru_cache(maxsize=8192)
def visible_share(shape: str, side: int, shift: tuple[int, int], scale: float) -> np.ndarray:
    """Share of each pixel that a shape covers: float32 [side, side], edges softened over one pixel."""
    axis = (2 * np.arange(side, dtype=np.float32) + 1) / side - 1  # middles of the pixels, from -1 to 1
    x = ((axis - shift[0] / 16) / scale)[None, :]
    y = ((axis - shift[1] / 16) / scale)[:, None]
    distance = _digit(shape, x, y) if shape in SEGMENTS else DISTANCES[shape](x, y)
    return np.clip(0.5 - distance * (scale * side / 2), 0, 1).astype(np.float32)


def _half_planes(x: np.ndarray, y: np.ndarray, sides: int, inner: float) -> np.ndarray:
    """Signed distances [sides, h, w] to the lines of a regular polygon with a flat side down."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(sides) / sides
    return np.stack([x * np.cos(t) + y * np.sin(t) - inner for t in angles])


def _box(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.maximum(abs(x) - width, abs(y) - height)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _half_planes(x, y - 0.22, 3, 0.58).max(0)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A point of a five-pointed star is outside one line of its inner pentagon at most.
    return np.sort(_half_planes(x, 0.09 - y, 5, 0.32), axis=0)[-2]


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x - 0.6, y))


def _digit(digit: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    half, long = 0.16, 0.58
    bars = {
        "a": (0, -0.84, long, half),
        "b": (0.42, -0.42, half, long),
        "c": (0.42, 0.42, half, long),
        "d": (0, 0.84, long, half),
        "e": (-0.42, 0.42, half, long),
        "f": (-0.42, -0.42, half, long),
        "g": (0, 0, long, half),
    }
    return np.min([_box(x - cx, y - cy, w, h) for cx, cy, w, h in map(bars.get, SEGMENTS[digit])], axis=0)


DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.96,
    "square": lambda x, y: _box(x, y, 0.86, 0.86),
    "triangle": _triangle,
    "diamond": lambda x, y: (abs(x) + abs(y) - 1.05) / np.sqrt(2),
    "star": _star,
    "cross": lambda x, y: np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95)),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.72) - 0.24,
    "moon": _moon,
}
"""Signed distance to the edge, negative inside; x right and y down in [-1, 1], unit: half the extent."""
