"""HTML to text and image spans in reading order, without the page's navigation."""

import base64
import binascii
import re
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

from lxml import etree
from lxml import html as lxml_html

from megamm.data.documents import Image, Text
from megamm.data.images import ImageError, header_size

LoadImage = Callable[[str], Image | None]
"""Given the ``src`` of an image, its bytes; None if it cannot be had (the callee notes why)."""

DROPPED_TAGS = frozenset(
    """
    script style nav footer head template noscript iframe button select textarea input form svg math
    audio video object canvas dialog
    """.split()  # noqa: SIM905
)
DROPPED_ROLES = frozenset(("navigation", "search", "contentinfo", "banner"))
DROPPED_CLASSES = frozenset(
    """
    navheader navfooter nav navbar navigation navigationbar breadcrumb breadcrumbs sphinxsidebar
    related toc menu footer headerlink skip-link indexdiv reportbug navinextprevious
    docnav sphx-glr-footer sphx-glr-signature sphx-glr-download-link-note
    """.split()  # noqa: SIM905
)
BLOCKS = frozenset(
    """
    address article aside blockquote body center dd details div dl dt fieldset figcaption figure h1 h2
    h3 h4 h5 h6 header hr li main ol p pre section summary table tbody tfoot thead tr ul caption
    """.split()  # noqa: SIM905
)
LINK_BLOCKS = {"ul": 1, "ol": 1, "dl": 1, "p": 2, "table": 2, "div": 3}
"""Blocks that are navigation if nearly all their text is links, and the fewest links it takes."""
LINK_SHARE = 0.9
ICON_MAX = 15
"""An image no larger than this on both sides is a bullet or an icon."""
ALT_WINDOW = 400
"""Characters before and after an image in which an equal caption makes its alt text redundant."""

# Stand-ins while text is collected: white space to keep as it is (code), a line's end however many follow each
# other, and "swallow the white space that follows" (list bullets).
_SPACE, _NEWLINE, _LINE, _EAT = "\ue000", "\ue001", "\ue002", "\ue003"


class _Alt(str):
    """Alternative text of the image before it."""


def html_spans(page: str, load_image: LoadImage) -> tuple[Text | Image, ...]:
    """Spans of a page in reading order.

    Scripts, navigation, headers, footers and blocks of links are left out, as are icons. The alternative
    text of an image follows it, unless the text around says the same. Headings, list items, table rows and
    code become lines of plain text.
    """
    parser = lxml_html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        root = lxml_html.document_fromstring(page.encode("utf-8"), parser=parser)
    except etree.ParserError:  # nothing but white space or comments
        return ()
    builder = _Builder(load_image)
    mains = root.xpath("//main") or root.xpath("//*[@role='main']")
    content = mains[0] if len(mains) == 1 else root.find("body")
    title = root.findtext("head/title")
    if title and not root.xpath("//h1|//h2|//h3|//h4"):
        builder.add(f"{' '.join(title.split())}\n\n")
    if content is not None:
        builder.visit(content)
    return builder.spans()


class _Builder:
    """Collects text and images while walking the tree."""

    def __init__(self, load_image: LoadImage):
        self.load_image = load_image
        self.parts: list[str | _Alt | Image] = []

    def add(self, text: str) -> None:
        self.parts.append(text)

    def words(self, text: str | None) -> None:
        if text:
            self.add(re.sub(r"\s+", " ", text))

    def visit(self, element: etree._Element) -> None:
        """Add an element and what follows it up to the next tag."""
        if not _is_dropped(element):
            tag = element.tag
            if tag == "img":
                self.image(element)
            elif tag == "br":
                self.add("\n")
            elif tag == "pre":
                code = element.text_content().strip("\n").expandtabs()
                self.add("\n\n" + code.replace(" ", _SPACE).replace("\n", _NEWLINE) + "\n\n")
            elif tag == "li":
                self.list_item(element)
            elif tag == "tr" and not any(e.tag in BLOCKS or e.tag == "img" for e in element.iterdescendants()):
                cells = [" ".join(cell.text_content().split()) for cell in element if cell.tag in ("td", "th")]
                self.add(_LINE + " | ".join(cells) + _LINE)
            else:
                gap = _LINE if _is_tight(element) else "\n\n" if tag in BLOCKS else ""
                self.add(gap)
                self.children(element)
                self.add(_LINE if tag == "dt" else gap)
        self.words(element.tail)

    def children(self, element: etree._Element) -> None:
        self.words(element.text)
        for child in element:
            self.visit(child)

    def list_item(self, element: etree._Element) -> None:
        parent = element.getparent()
        bullet = "-"
        if parent is not None and parent.tag == "ol":
            items = [child for child in parent if child.tag == "li"]
            start = parent.get("start", "1")
            bullet = f"{items.index(element) + (int(start) if start.isdecimal() else 1)}."
        self.add(f"{_LINE}{bullet}{_EAT}")
        self.children(element)
        self.add(_LINE)

    def image(self, element: etree._Element) -> None:
        alt = " ".join((element.get("alt") or "").split())
        if re.fullmatch(r"\[\w+\]", alt):
            return  # the sign beside a note, as DocBook makes it: [Note], [Tip], [Warning]
        source = element.get("src") or ""
        if not source or source.startswith("data:"):
            source = element.get("data-src") or source  # images loaded late by a script
        image = load_data_uri(source) if source.startswith("data:") else self.load_image(source)
        if image is not None:
            try:
                if max(header_size(image.data)) <= ICON_MAX:
                    return
            except ImageError:
                pass  # kept: preparation lists it as broken
            self.parts.append(image)
        if alt and not re.search(r"\.(png|jpe?g|gif|svg|webp)$", alt, re.IGNORECASE):
            self.parts.append(_Alt(alt + ("\n\n" if _is_alone(element) else " ")))

    def spans(self) -> tuple[Text | Image, ...]:
        """What was collected, white space tidied, repeated alt texts dropped."""
        spans: list[Text | Image] = []
        text = ""
        for index, part in enumerate(self.parts):
            if isinstance(part, Image):
                spans += [Text(text=text), part]
                text = ""
            elif not (isinstance(part, _Alt) and self._is_repeated(index)):
                text += part
        spans.append(Text(text=text))
        tidy: list[Text | Image] = []
        for span in spans:
            if isinstance(span, Text):
                text = tidy_text(span.text)
                if not tidy:
                    text = text.lstrip()
                elif isinstance(tidy[-1], Image):
                    text = text.lstrip("\n")  # the image's end already parts it from the text
                if text.strip():
                    tidy.append(Text(text=text))
            else:
                tidy.append(span)
        if tidy and isinstance(tidy[-1], Text):
            tidy[-1] = Text(text=tidy[-1].text.rstrip())
        return tuple(tidy)

    def _is_repeated(self, index: int) -> bool:
        """Whether the alt text at ``index`` stands in the text just before or after it."""
        alt = _letters(self.parts[index])
        before = _letters("".join(p for p in self.parts[max(0, index - 40) : index] if isinstance(p, str)))
        after = _letters("".join(p for p in self.parts[index + 1 : index + 40] if isinstance(p, str)))
        return not alt or alt in before[-ALT_WINDOW:] or alt in after[:ALT_WINDOW]


def tidy_text(text: str) -> str:
    """Collapse white space that carries no meaning and restore that of code."""
    text = re.sub(r"[ \t\r\f\v]+", " ", text.replace("\u00a0", " ").replace("\u200b", ""))
    text = re.sub(rf"{_EAT}[\s{_LINE}]*", " ", text)
    text = re.sub(rf"[ \n{_LINE}]+", _white_space, text)
    text = re.sub(r"\n(-|\d+\.) ?(?=\n|$)", "\n", text)  # bullets whose item was dropped
    return text.replace(_SPACE, " ").replace(_NEWLINE, "\n")


def _white_space(run: re.Match) -> str:
    """What a run of blanks, newlines and line ends comes to."""
    breaks = run.group().replace(" ", "")
    return "\n\n" if "\n\n" in breaks.replace(_LINE, "") else "\n" if breaks else " "


def load_data_uri(uri: str) -> Image | None:
    """The image inside a ``data:`` URI, or None if it is damaged."""
    header, _, body = uri.partition(",")
    try:
        data = base64.b64decode(body) if header.endswith(";base64") else unquote_to_bytes(body)
    except (binascii.Error, ValueError):
        return None
    return Image(data=data, name="data URI")


def _is_dropped(element: etree._Element) -> bool:
    tag = element.tag
    if not isinstance(tag, str) or tag in DROPPED_TAGS or "hidden" in element.attrib:
        return True
    if tag == "header" and not any(e.tag in ("article", "main", "section") for e in element.iterancestors()):
        return True
    if element.get("role") in DROPPED_ROLES or DROPPED_CLASSES & set((element.get("class") or "").lower().split()):
        return True
    return tag in LINK_BLOCKS and _is_link_block(element, LINK_BLOCKS[tag])


def _is_tight(element: etree._Element) -> bool:
    """Whether a block is set off by a new line only, without a blank one."""
    parent = element.getparent()
    inside = parent is not None and parent.tag in ("li", "dd", "td", "th")
    return element.tag in ("dd", "tr", "td", "th", "thead", "tbody", "tfoot") or (
        element.tag in ("p", "ul", "ol") and inside
    )


def _is_alone(image: etree._Element) -> bool:
    """Whether no text stands beside an image in its block."""
    element = image
    while (parent := element.getparent()) is not None:
        if any(text and text.strip() for text in (parent.text, *(child.tail for child in parent))):
            return False
        if parent.tag in BLOCKS or parent.tag in ("td", "th"):
            return True
        element = parent
    return True


def _is_link_block(element: etree._Element, min_links: int) -> bool:
    """Whether a block is a menu: almost all of its letters inside links, and no image."""
    if element.find(".//img") is not None:
        return False
    links = [link for link in element.iter("a") if link.get("href")]
    if len(links) < min_links:
        return False
    inside = sum(len(_letters(link.text_content())) for link in links)
    return inside >= LINK_SHARE * len(_letters(element.text_content()))


def _letters(text: str) -> str:
    """Letters only, lower case: what text is when layout, numbers and punctuation are set aside."""
    return "".join(character for character in text.lower() if character.isalpha())
