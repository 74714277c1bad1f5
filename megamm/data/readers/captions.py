"""Pictures with a caption in a text file beside them: x.png + x.txt."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megamm.data.documents import Document, Image, Skipped, Text, printable
from megamm.data.readers.streams import RefusedError, decode_text, read_file, read_picture

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
VECTOR_SUFFIXES = (".svg", ".svgz")

_TRANSLATION = re.compile(r"[a-z]{2,3}([_@][A-Za-z]+)*(\.[\w-]+)?=")


def captioned(id: str, images: Sequence[Image], caption: str) -> Document:
    """Pictures followed by their caption."""
    files = tuple(image.file for image in images if image.file)  # members of a tar are no files
    return Document(id=id, spans=(*images, Text(text=caption.strip())), files=files)


def read_pair(image: Path, caption: Path, root: Path, id: str) -> Iterator[Document | Skipped]:
    """Read a picture and its caption; both have to lie in ``root``."""
    try:
        text = decode_text(read_file(caption, root, "caption"))
        picture = read_picture(image, root, image.name)
    except UnicodeDecodeError:
        yield Skipped(id=id, reason="wrong encoding: caption is not UTF-8")
    except RefusedError as error:
        yield Skipped(id=id, reason=str(error))
    else:
        yield captioned(id, [picture], without_translations(text))


def read_class(image: Path, root: Path, id: str) -> Iterator[Document | Skipped]:
    """Read a picture of a class; its caption is the name of its folder, with underscores as blanks."""
    try:
        picture = read_picture(image, root, image.name)
    except RefusedError as error:
        yield Skipped(id=id, reason=str(error))
    else:
        yield captioned(id, [picture], printable(image.parent.name.replace("_", " ")))


def without_translations(text: str) -> str:
    """The first line alone where all further ones are translations (``de.utf8=Ein Hund.``), else all."""
    first, *rest = [line for line in text.splitlines() if line.strip()] or [""]
    return first if rest and all(_TRANSLATION.match(line) for line in rest) else text


def match_captions(names: list[str]) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """Pair image and caption files by their names without suffix.

    Returns:
        (image, caption) names, and what has no partner: pictures without a caption, captions without a
        picture, vector drawings that have no pixel version.
    """
    captions: dict[str, str] = {}
    pairs, skipped, used = [], [], set()
    for name in names:
        if name.lower().endswith(".txt"):
            stem = str(Path(name).with_suffix(""))
            if captions.setdefault(stem, name) != name:  # x.txt and x.TXT
                skipped.append(Skipped(id=name, reason="second caption"))
    images = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES)]
    for name in images:
        stem = str(Path(name).with_suffix(""))
        if stem in captions:
            pairs.append((name, captions[stem]))
            used.add(stem)
        else:
            skipped.append(Skipped(id=name, reason="image without a caption file"))
    for name in names:
        if name.lower().endswith(VECTOR_SUFFIXES):
            # Told apart, since only the latter is a picture lost.
            beside = "beside" if str(Path(name).with_suffix("")) in used else "without"
            skipped.append(Skipped(id=name, reason=f"SVG image {beside} a pixel version"))
    skipped += [
        Skipped(id=name, reason="caption file without an image") for stem, name in captions.items() if stem not in used
    ]
    return pairs, skipped
