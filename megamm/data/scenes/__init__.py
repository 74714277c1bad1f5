"""The built-in generator of procedural scenes: captions, interleaved stories and text, without limit.

Every document is a pure function of (kind, seed, index). The world is small (a closed vocabulary, pictures on
a grid of 4x4 cells) and its difficulty is a known spectrum, so that the loss of small models falls smoothly
with size and with tokens:

- a picture's background is in every patch, the colour of a big object in some; its shape and place, numbers,
  relations and sums ask for ever more;
- text states facts of people with a power law of how often each is met, and follows rules of several kinds;
- a story needs both, and refers from one picture back to another.

:func:`skills` is the table of difficulty, with shares and entropies.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

from megamm.data.documents import Document, Image, Text
from megamm.data.scenes import captions, stories, texts
from megamm.data.scenes.difficulty import Kind, Skill, caption_entropy, skills, text_entropy
from megamm.data.scenes.scene import Scene, check_image_size, encode_png, render
from megamm.errors import InputError

__all__ = ["Skill", "caption_entropy", "document", "draw", "generate_scenes", "skills", "text_entropy"]

DRAW: dict[Kind, Callable[[random.Random], Sequence[str | Scene]]] = {
    "caption": captions.draw_caption,
    "interleaved": stories.draw_story,
    "text": texts.draw_text,
}


def generate_scenes(kind: Kind, num_documents: int, seed: int, image_size: int) -> Iterator[Document]:
    """Yield documents 0..num_documents - 1 of a seed; see :func:`document`."""
    _check(kind, image_size)
    return (document(kind, index, seed, image_size) for index in range(num_documents))


def document(kind: Kind, index: int, seed: int, image_size: int) -> Document:
    """Make document ``index`` of an endless series.

    Args:
        kind: caption (a picture, then its caption), interleaved (a story with 2 to 4 pictures) or text.
        index: from 0 on, without limit.
        seed: of the series; the facts of the invented world are the same for all.
        image_size: height and width of pictures in pixels, a multiple of 4 from 16 on. What the document
            says does not depend on it.

    Raises:
        InputError: ``kind`` or ``image_size`` is not one of these.
    """
    _check(kind, image_size)
    spans = tuple(
        Image(data=encode_png(render(span, image_size)), name=f"{number}.png")
        if isinstance(span, Scene)
        else Text(text=span)
        for number, span in enumerate(draw(kind, index, seed))
    )
    return Document(id=f"scenes-{kind}-{seed}-{index:06d}", spans=spans)


def draw(kind: Kind, index: int, seed: int) -> Sequence[str | Scene]:
    """Make a document's spans with its pictures as scenes, not yet drawn."""
    # A generator for each document: any one can be made alone, in any process.
    digest = hashlib.blake2b(f"{kind} {seed} {index}".encode(), digest_size=8).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    return DRAW[kind](rng)


def _check(kind: str, image_size: int) -> None:
    if kind not in get_args(Kind):
        raise InputError(f"kind: {kind!r} is not one of {', '.join(get_args(Kind))}")
    check_image_size(image_size)
