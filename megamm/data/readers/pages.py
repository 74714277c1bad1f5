"""Web pages: HTML, Markdown and notebook files with the images in them and beside them."""

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from megamm.data.documents import Document, Image, Skipped, printable
from megamm.data.readers.html import html_spans
from megamm.data.readers.markdown import render_markdown
from megamm.data.readers.notebooks import NotebookError, notebook_page
from megamm.data.readers.streams import RefusedError, decode_text, read_file, read_picture

HTML_SUFFIXES = (".html", ".htm", ".xhtml")
MARKDOWN_SUFFIXES = (".md", ".markdown")
NOTEBOOK_SUFFIXES = (".ipynb",)

MAX_PAGE_BYTES = 8 * 2**20
"""Of a larger page reading would take over half a gigabyte."""

_CHARSET = re.compile(
    rb"""(?:<meta\b[^>]*?\bcharset|<\?xml\b[^>]*?\bencoding)\s*=\s*["']?\s*([A-Za-z0-9_:.-]+)""", re.IGNORECASE
)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_SUPERSETS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
"""What browsers read in place of an encoding (https://encoding.spec.whatwg.org/#names-and-labels)."""
_ENCODINGS = re.compile(
    r"utf-8|cp(125[0-8]|866|874|932|949)|iso8859-([2-8]|1[03-6])|koi8-[ru]|mac-(roman|cyrillic)|gb18030|big5|euc_jp|"
    r"iso2022_jp"
)


def read_page(path: Path, root: Path, id: str) -> Iterator[Document | Skipped]:
    """Read one page; images are looked for under ``root`` only, and those not found or not used are listed."""
    try:
        content = read_file(path, root, "page", MAX_PAGE_BYTES)
    except RefusedError as error:
        yield Skipped(id=id, reason=str(error))
        return
    is_markdown = path.suffix.lower() in MARKDOWN_SUFFIXES
    is_notebook = path.suffix.lower() in NOTEBOOK_SUFFIXES
    # Browsers look at the first bytes only, too.
    declared = None if is_markdown or is_notebook else _CHARSET.search(content[:2048])
    try:
        page = _decode(content, declared.group(1).decode() if declared else "utf-8")
    except (UnicodeError, LookupError):
        yield Skipped(id=id, reason="wrong encoding: not UTF-8 nor what the page declares")
        return
    if is_markdown:
        # Through HTML: pages of both kinds are read by the same rules. Front matter is for a site generator, not for
        # readers.
        page = render_markdown(_FRONT_MATTER.sub("", page.replace("\r\n", "\n")))
    elif is_notebook:
        try:
            page = notebook_page(page, render_markdown)
        except NotebookError as error:
            yield Skipped(id=id, reason=f"damaged notebook: {error}")
            return
    skipped: list[Skipped] = []

    def note(source: str, reason: str) -> None:
        skipped.append(Skipped(id=f"{id}: {printable(source[:200])}", reason=reason))

    files: list[str] = []

    def load_image(source: str) -> Image | None:
        found = _load_image(source, path.parent, root)
        if isinstance(found, Image):
            # Used, though the page may be left out: such a picture is not one that nothing refers to.
            files.append(found.file)
            return found
        note(source, found)
        return None

    spans = html_spans(page, load_image, note)
    yield from skipped
    yield Document(id=id, spans=spans, files=tuple(files))


def _decode(content: bytes, label: str) -> str:
    """Text by a mark at the start, else by the label of an encoding as a browser understands it."""
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return decode_text(content)
    name = codecs.lookup(label).name  # one name for each of an encoding's many
    name = _SUPERSETS.get(name, name)
    if name.startswith("utf-16"):  # a label that could be read is not UTF-16
        name = "utf-8"
    # Python also knows codecs that are no encodings of pages (rot13, punycode, zip).
    if not _ENCODINGS.fullmatch(name):
        raise LookupError(label)
    return content.decode(name)


def _load_image(source: str, folder: Path, root: Path) -> Image | str:
    """The image that a page in ``folder`` refers to, or the reason why there is none."""
    try:
        url = urlsplit(source)
    except ValueError:
        return "image not found"
    if url.scheme or url.netloc:
        return "remote image"
    name = unquote(url.path)  # without ?query and #fragment
    # A path from the site's root is taken from the folder that was given.
    path = os.path.normpath(root / name.lstrip("/") if name.startswith("/") else folder / name)
    # For its own reason in the list; read_picture refuses it in any case, links followed.
    if not Path(path).is_relative_to(os.path.normpath(root)):
        return "image outside the input folder"
    if path.lower().endswith((".svg", ".svgz")):
        return "SVG image"
    try:
        return read_picture(Path(path), root, name)
    except RefusedError as error:
        return str(error)
