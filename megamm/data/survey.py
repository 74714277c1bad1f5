"""A look at raw inputs before anything is made of them: their kind, text, images, and what is left out."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from megamm.data.documents import Document, Image, Skipped, Text
from megamm.data.images import ImageError, header_size
from megamm.data.readers import open_inputs

SAMPLE = 1000
"""Documents whose sizes are kept."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What an input holds.

    Attributes:
        kind: caption, interleaved or text.
        documents: that have text.
        characters: of their text.
        images: in them; a damaged one is found only when it is prepared.
        image_side: the median of their longer sides in pixels, 0 without images.
        skipped: how many inputs are left out, by reason.
        sizes: characters and images of up to about 1,000 documents, spread evenly.
    """

    path: str
    kind: str
    documents: int
    characters: int
    images: int
    image_side: int
    skipped: dict[str, int] = field(default_factory=dict)
    sizes: list[list[int]] = field(default_factory=list)


def survey(
    path: str, kind: str = "auto", report: Callable[[int, int | None], None] = lambda done, total: None
) -> Survey:
    """Read all documents of a folder or file.

    Args:
        kind: one of KINDS, or auto.
        report: called with reading tasks done and in all (None if unknown).

    Raises:
        InputError: there is nothing to read, or files of several kinds.
    """
    inputs = open_inputs([path], kind)
    skipped: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    sides: list[int] = []
    unseen = dict(inputs.pictures)
    for done, task in enumerate(inputs.tasks, start=1):
        for item in task():
            if isinstance(item, Skipped):
                skipped[item.reason.split(":")[0]] += 1
                continue
            for file in item.files:
                unseen.pop(file, None)
            characters = sum(len(span.text) for span in item.spans if isinstance(span, Text))
            if not characters:
                skipped["no text"] += 1
                continue
            pictures = [span for span in item.spans if isinstance(span, Image)] if inputs.kinds[0] != "text" else []
            sizes.append((characters, len(pictures)))
            sides += _sides(pictures) if len(sides) < SAMPLE else []
        report(done, inputs.num_tasks)
    if unseen:
        skipped["image that nothing refers to"] += len(unseen)
    whole = np.array(sizes, np.int64).reshape(-1, 2)
    return Survey(
        path=path,
        kind=inputs.kinds[0],
        documents=len(whole),
        characters=int(whole[:, 0].sum()),
        images=int(whole[:, 1].sum()),
        image_side=int(np.median(sides)) if sides else 0,
        skipped=dict(skipped.most_common()),
        sizes=whole[:: max(1, -(-len(whole) // SAMPLE))].tolist(),
    )


def first_texts(path: str, kind: str, count: int) -> list[str]:
    """Text of the first ``count`` documents of an input, without those that have none."""
    return list(islice(_texts(path, kind), count))


def _texts(path: str, kind: str) -> Iterator[str]:
    for task in open_inputs([path], kind).tasks:
        for item in task():
            text = (
                "".join(span.text for span in item.spans if isinstance(span, Text))
                if isinstance(item, Document)
                else ""
            )
            if text:
                yield text


def _sides(pictures: list[Image]) -> list[int]:
    """Longer side in pixels of each picture whose header can be read."""
    found = []
    for picture in pictures:
        try:
            found.append(max(header_size(picture.data)))
        except ImageError:
            continue
    return found
