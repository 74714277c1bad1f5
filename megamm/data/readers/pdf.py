"""PDF files, through pdfium: text and pictures in reading order.

A PDF holds glyphs and pictures at places of a page. pdfium puts the glyphs into reading order. A picture stands before
the first text below it in its column, as a reader of the page meets it.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megamm.data.documents import Document, Image, Skipped, Text, one_line
from megamm.data.readers.streams import RefusedError, read_file

SUFFIXES = (".pdf",)
ICON_MAX = 32
"""Of a picture no larger than this on both sides nothing can be seen."""
MAX_PIXELS = 100_000_000
REPEATED_ON = 4
"""A line at the edge of at least so many pages, and of half of them, is a running head or foot."""

WRAPPED_FROM = 45
"""A line of so many letters, amid a sentence at its end, goes on in the next one even if that begins with a capital."""
_HYPHEN = "\ufffe"
"""What pdfium gives for a hyphen at the end of a line, with the line's end taken away."""


def read_pdf(path: Path, root: Path, id: str) -> Iterator[Document | Skipped]:
    """One document of all pages; pages and pictures that cannot be read are listed."""
    import pypdfium2

    try:
        content = read_file(path, root, "PDF")
    except RefusedError as error:
        yield Skipped(id=id, reason=str(error))
        return
    try:
        file = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        locked = "password" in str(error).lower()
        yield Skipped(id=id, reason="encrypted PDF" if locked else f"damaged PDF: {one_line(error)}")
        return
    pages: list[list[Text | Image]] = []
    with file:
        for number in range(len(file)):
            try:
                spans = list(_page(file[number], f"{id}: page {number + 1}"))
            except Exception as error:  # damaged bytes may be anything
                yield Skipped(id=f"{id}: page {number + 1}", reason=f"damaged page of a PDF: {one_line(error)}")
                continue
            yield from (span for span in spans if isinstance(span, Skipped))
            pages.append([span for span in spans if not isinstance(span, Skipped)])
    dropped = _drop_running_lines(pages)
    if dropped:
        yield Skipped(id=f"{id}: {dropped} lines", reason="running head or foot of pages")
    yield Document(id=id, spans=tuple(span for page in pages for span in page))


def _page(page, id: str) -> Iterator[Text | Image | Skipped]:
    """Spans of a page, and why a picture is none."""
    import pypdfium2.raw

    text = page.get_textpage()
    count = text.count_chars()
    pictures = list(page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE]))
    boxes = [text.get_charbox(i) for i in range(count)] if pictures else []
    placed = [(_place(picture.get_bounds(), boxes), number) for number, picture in enumerate(pictures)]
    start = 0
    for place, number in sorted(placed):
        if place > start:
            yield _text(text.get_text_range(start, place - start))
            start = place
        yield _picture(pictures[number], f"{id}, image {number}")
    if count > start:
        yield _text(text.get_text_range(start, count - start))


def _place(bounds: tuple[float, ...], boxes: list[tuple[float, ...]]) -> int:
    """Number of the glyph before which a picture stands; boxes are left, bottom, right, top, upwards."""
    left, bottom, right, _ = bounds
    column = [i for i, box in enumerate(boxes) if box[0] < right and box[2] > left and box[2] > box[0]]
    below = next((i for i in column if boxes[i][3] <= bottom + 1), None)
    if below is None:
        return column[-1] + 1 if column else len(boxes)
    # From the first glyph of its line: those to the left may not reach under the picture.
    line = boxes[below]
    while below and boxes[below - 1][1] < line[3] and boxes[below - 1][3] > line[1]:
        below -= 1
    return below


def _picture(picture, id: str) -> Image | Skipped:
    width, height = picture.get_px_size()
    if width <= ICON_MAX and height <= ICON_MAX:
        return Skipped(id=id, reason=f"icon: at most {ICON_MAX} pixels a side")
    if width * height > MAX_PIXELS:
        return Skipped(id=id, reason=f"image of a PDF over the size limit: {width} x {height} pixels")
    data = io.BytesIO()
    try:
        picture.extract(data)  # a JPEG as it is, others as PNG
    except Exception as error:
        return Skipped(id=id, reason=f"damaged image of a PDF: {one_line(error)}")
    return Image(data=data.getvalue(), name=id)


def _text(text: str) -> Text:
    """Text in paragraphs: lines that go on in the next one are joined."""
    paragraphs: list[str] = []
    last = ""
    for line in text.replace(_HYPHEN, "").strip().splitlines():
        amid = bool(last) and last.rstrip()[-1:] not in ".:;!?"
        if amid and (line[:1].islower() or (len(last) >= WRAPPED_FROM and line[:1].isalpha())):
            paragraphs[-1] += f" {line}"
        else:
            paragraphs.append(line)
        last = line
    return Text(text="\n".join(paragraphs) + "\n")


def _drop_running_lines(pages: list[list[Text | Image]]) -> int:
    """Take away first and last lines that most pages have but for numbers; returns how many lines."""

    def edges(page: list[Text | Image]) -> Iterator[tuple[int, bool, str]]:
        for number, first in ((0, True), (len(page) - 1, False)):
            span = page[number] if page else None
            if isinstance(span, Text):
                lines = span.text.strip().split("\n")
                yield number, first, re.sub(r"\d+", "0", lines[0 if first else -1].strip())

    seen = Counter(entry[1:] for page in pages for entry in edges(page))
    running = {key for key, count in seen.items() if key[1] and count >= max(REPEATED_ON, len(pages) / 2)}
    dropped = 0
    for page in pages:
        for number, first, line in list(edges(page)):
            span = page[number]
            if (first, line) in running and isinstance(span, Text):
                lines = span.text.strip().split("\n")
                page[number] = Text(text="\n".join(lines[1:] if first else lines[:-1]) + "\n")
                dropped += 1
    return dropped
