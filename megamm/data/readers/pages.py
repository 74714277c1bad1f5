"""Web pages: HTML and Markdown files with the images beside them."""

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt

from megamm.data.documents import Document, Image, Skipped
from megamm.data.readers.html import html_spans

HTML_SUFFIXES = (".html", ".htm", ".xhtml")
MARKDOWN_SUFFIXES = (".md", ".markdown")

_CHARSET = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_:.-]+)""")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def read_page(path: Path, root: Path, id: str) -> Iterator[Document | Skipped]:
    """Read one page; images are looked for under ``root`` only, and those not found are listed."""
    content = path.read_bytes()
    is_markdown = path.suffix.lower() in MARKDOWN_SUFFIXES
    declared = None if is_markdown else _CHARSET.search(content[:2048])
    try:
        page = content.decode(declared.group(1).decode() if declared else "utf-8").removeprefix("\ufeff")
    except (UnicodeDecodeError, LookupError):
        yield Skipped(id=id, reason="wrong encoding: not UTF-8 nor what the page declares")
        return
    if is_markdown:
        page = _markdown().render(_FRONT_MATTER.sub("", page.replace("\r\n", "\n")))
    skipped: list[Skipped] = []

    def load_image(source: str) -> Image | None:
        found = _load_image(source, path.parent, root)
        if isinstance(found, Image):
            return found
        skipped.append(Skipped(id=f"{id}: {source[:200]}", reason=found))
        return None

    spans = html_spans(page, load_image)
    yield from skipped
    yield Document(id=id, spans=spans)


def _load_image(source: str, folder: Path, root: Path) -> Image | str:
    """The image that a page in ``folder`` refers to, or the reason why there is none."""
    try:
        url = urlsplit(source)
    except ValueError:
        return "image not found"
    if url.scheme or url.netloc:
        return "remote image"
    name = unquote(url.path)
    path = os.path.normpath(root / name.lstrip("/") if name.startswith("/") else folder / name)
    if not Path(path).is_relative_to(os.path.normpath(root)):
        return "image outside the input folder"
    if path.lower().endswith((".svg", ".svgz")):
        return "SVG image"
    try:
        return Image(data=Path(path).read_bytes(), name=name)
    except (OSError, ValueError):
        return "image not found"


@lru_cache(maxsize=1)
def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": True}).enable("table")
