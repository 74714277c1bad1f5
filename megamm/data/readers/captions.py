"""Pictures with a caption in a text file beside them: x.png + x.txt."""

import re
from collections.abc import Iterator
from pathlib import Path

from megamm.data.documents import Document, Image, Skipped, Text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
VECTOR_SUFFIXES = (".svg", ".svgz")

_TRANSLATION = re.compile(r"[a-z]{2,3}([_@][A-Za-z]+)*(\.[\w-]+)?=")


def captioned(id: str, image: Image, caption: str) -> Document:
    """A picture followed by its caption."""
    return Document(id=id, spans=(image, Text(text=caption.strip())))


def read_pair(image: Path, caption: Path, id: str) -> Iterator[Document | Skipped]:
    """Read a picture and its caption."""
    try:
        text = caption.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        yield Skipped(id=id, reason="wrong encoding: caption is not UTF-8")
        return
    yield captioned(id, Image(data=image.read_bytes(), name=image.name), without_translations(text))


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
    captions = {str(Path(n).with_suffix("")): n for n in names if n.lower().endswith(".txt")}
    images = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES)]
    pairs, skipped, used = [], [], set()
    for name in images:
        stem = str(Path(name).with_suffix(""))
        if stem in captions:
            pairs.append((name, captions[stem]))
            used.add(stem)
        else:
            skipped.append(Skipped(id=name, reason="image without a caption file"))
    for name in names:
        stem = str(Path(name).with_suffix(""))
        if name.lower().endswith(VECTOR_SUFFIXES) and stem in captions and stem not in used:
            skipped.append(Skipped(id=name, reason="SVG image without a pixel version"))
            used.add(stem)
    skipped += [
        Skipped(id=name, reason="caption file without an image") for stem, name in captions.items() if stem not in used
    ]
    return pairs, skipped
