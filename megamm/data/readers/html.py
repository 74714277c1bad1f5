"""HTML to text and image spans in reading order, without the page's navigation."""

import base64
import binascii
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
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
PICTURE_TAGS = ("svg", "math", "video", "object", "canvas")
"""Pictures that are not read; told where they stand."""
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
MAX_FRAMES = 10_000
"""Calls in each other that it takes to walk a page as deep as the parser allows (2,048 elements)."""
ICON_MAX = 15
"""An image no larger than this on both sides is a bullet or an icon."""
ALT_WINDOW = 400
"""Characters before and after an image in which an equal caption makes its alt text redundant."""

ALT_PARTS = 40
"""Parts, of text and pictures, before and after it that are looked at for this."""

# Stand-ins while text is collected: white space to keep as it is (code), a line's end however many follow each
# other, and "swallow the white space that follows" (list bullets).
_SPACE, _NEWLINE, _LINE, _EAT = "\ue000", "\ue001", "\ue002", "\ue003"


class _Alt(str):
    """Alternative text of the image before it."""


def html_spans(
    page: str, load_image: LoadImage, note: Callable[[str, str], None] = lambda source, reason: None
) -> tuple[Text | Image, ...]:
    """Spans of a page in reading order; ``note`` is told source and reason of each picture that is left out.

    Scripts, navigation, headers, footers and blocks of links are left out, as are icons. The alternative
    text of an image follows it, unless the text around says the same. Headings, list items, table rows and
    code become lines of plain text.
    """
    # The walk calls itself for each level; Python's own limit is 1,000.
    sys.setrecursionlimit(max(sys.getrecursionlimit(), MAX_FRAMES))
    # From bytes with the encoding said: lxml refuses a str with an encoding declaration. huge_tree, as libxml2 else
    # gives up on long text and deep pages.
    parser = lxml_html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True)
    try:
        root = lxml_html.document_fromstring(page.encode("utf-8"), parser=parser)
    except etree.ParserError:  # nothing but white space or comments
        return ()
    # The parser mends what it can and goes on; after a fatal error the rest of the page is missing.
    for entry in parser.error_log.filter_from_fatals():
        note("rest", f"damaged page: {entry.message}")
    builder = _Builder(load_image, note, _menus(root))
    mains = root.xpath("//main") or root.xpath("//*[@role='main']")
    # Of several none is known to be the main one.
    content = mains[0] if len(mains) == 1 else root.find("body")
    title = root.findtext("head/title")
    # A heading mostly says the title again.
    if title and not root.xpath("//h1|//h2|//h3|//h4"):
        builder.add(f"{' '.join(title.split())}\n\n")
    if content is not None:
        builder.visit(content)
    return builder.spans()


class _Builder:
    """Collects text and images while walking the tree."""

    def __init__(self, load_image: LoadImage, note: Callable[[str, str], None], menus: set[etree._Element]):
        self.load_image, self.note, self.menus = load_image, note, menus
        self.parts: list[str | _Alt | Image] = []
        self.numbers: dict[etree._Element, int] = {}
        # Answers kept by element: without them a page of many pictures takes time by the square.
        self.alone: dict[etree._Element, bool] = {}
        self.letters: dict[int, tuple[str, str]] = {}

    def add(self, text: str) -> None:
        self.parts.append(text)

    def words(self, text: str | None) -> None:
        if text:
            self.add(re.sub(r"\s+", " ", text))

    def visit(self, element: etree._Element) -> None:
        """Add an element and what follows it up to the next tag."""
        if _is_dropped(element, self.menus):
            self.dropped(element)
        else:
            tag = element.tag
            if tag == "img":
                self.image(element)
            elif tag == "br":
                self.add("\n")
            elif tag == "pre":
                # White space of code has a meaning: stand-ins save it from being tidied.
                code = element.text_content().strip("\n").expandtabs()
                self.add("\n\n" + code.replace(" ", _SPACE).replace("\n", _NEWLINE) + "\n\n")
            elif tag == "li":
                self.list_item(element)
            # A row on one line; rows that hold blocks are layout, and are read as such.
            elif tag == "tr" and not any(e.tag in BLOCKS or e.tag == "img" for e in element.iterdescendants()):
                cells = [" ".join(cell.text_content().split()) for cell in element if cell.tag in ("td", "th")]
                self.add(_LINE + " | ".join(cells) + _LINE)
            else:
                gap = _LINE if _is_tight(element) else "\n\n" if tag in BLOCKS else ""
                self.add(gap)
                self.children(element)
                self.add(_LINE if tag == "dt" else gap)
        # Also after a dropped element: in lxml the text behind an element belongs to it.
        self.words(element.tail)

    def dropped(self, element: etree._Element) -> None:
        """Tell of the pictures in an element that is left out."""
        if isinstance(element.tag, str):
            for inner in element.iter("img", *PICTURE_TAGS):
                reason = f"{inner.tag} element" if inner.tag in PICTURE_TAGS else "image in navigation or a hidden part"
                self.note(inner.get("src") or inner.get("data") or inner.tag, reason)

    def children(self, element: etree._Element) -> None:
        self.words(element.text)
        for child in element:
            self.visit(child)

    def list_item(self, element: etree._Element) -> None:
        parent = element.getparent()
        bullet = "-"
        if parent is not None and parent.tag == "ol":
            if parent not in self.numbers:
                start = parent.get("start", "1").strip()
                # Anything may stand there, and int() refuses thousands of digits.
                self.numbers[parent] = int(start) if re.fullmatch(r"-?[0-9]{1,9}", start) else 1
            bullet = f"{self.numbers[parent]}."
            self.numbers[parent] += 1
        self.add(f"{_LINE}{bullet}{_EAT}")
        self.children(element)
        self.add(_LINE)

    def image(self, element: etree._Element) -> None:
        alt = " ".join((element.get("alt") or "").split())
        source = element.get("src") or ""
        if re.fullmatch(r"\[\w+\]", alt):  # the sign beside a note, as DocBook makes it: [Note], [Tip], [Warning]
            return self.note(source, "icon: the sign beside a note")
        # A data URI is often only a placeholder for the picture in data-src.
        if not source or source.startswith("data:"):
            source = element.get("data-src") or source  # images loaded late by a script
        if source.startswith("data:"):
            image = load_data_uri(source)
            if image is None:
                self.note(source[:40], "broken image: damaged data URI")
        else:
            image = self.load_image(source)
        if image is not None:
            try:
                if max(header_size(image.data)) <= ICON_MAX:
                    return self.note(source[:200], f"icon: at most {ICON_MAX} pixels a side")
            except ImageError:
                pass  # kept: preparation lists it as broken
            self.parts.append(image)
        # An alt text that is a file's name says nothing.
        if alt and not re.search(r"\.(png|jpe?g|gif|svg|webp)$", alt, re.IGNORECASE):
            self.parts.append(_Alt(alt + ("\n\n" if self.is_alone(element) else " ")))
        return None

    def is_alone(self, image: etree._Element) -> bool:
        """Whether no text stands beside an image in its block."""
        parent = image.getparent()
        if parent is None:
            return True
        if parent not in self.alone:
            texts = (parent.text, *(child.tail for child in parent))
            is_block = parent.tag in BLOCKS or parent.tag in ("td", "th")
            self.alone[parent] = not any(text and text.strip() for text in texts) and (
                is_block or self.is_alone(parent)
            )
        return self.alone[parent]

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
            tidy[-1] = Text(text=tidy[-1].text.rstrip())  # <eos> ends the document
        return tuple(tidy)

    def _is_repeated(self, index: int) -> bool:
        """Whether the alt text at ``index`` stands in the text just before or after it."""
        # A bounded number of parts: pages of thousands of pictures would take time by the square.
        alt, near = self._letters(index)[0], range(max(0, index - ALT_PARTS), min(len(self.parts), index + ALT_PARTS))
        before = "".join(self._letters(i)[1] for i in near if i < index)
        after = "".join(self._letters(i)[0] for i in near if i > index)
        return not alt or alt in before[-ALT_WINDOW:] or alt in after[:ALT_WINDOW]

    def _letters(self, index: int) -> tuple[str, str]:
        """Letters of the start and of the end of a part, which may be a whole book."""
        if index not in self.letters:
            part, most = self.parts[index], 4 * ALT_WINDOW
            text = part if isinstance(part, str) else ""
            self.letters[index] = _letters(text[:most]), _letters(text[-most:])
        return self.letters[index]


def tidy_text(text: str) -> str:
    """Collapse white space that carries no meaning and restore that of code."""
    # Before the stand-ins are restored: code keeps its blanks.
    text = re.sub(r"[ \t\r\f\v]+", " ", text.replace("\u00a0", " ").replace("\u200b", ""))
    text = re.sub(rf"{_EAT}[\s{_LINE}]*", " ", text)
    text = re.sub(rf"[ \n{_LINE}]+", _white_space, text)
    text = re.sub(r"\n(-|-?\d+\.) ?(?=\n|$)", "\n", text)  # bullets whose item was dropped
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


def _is_dropped(element: etree._Element, menus: set[etree._Element]) -> bool:
    tag = element.tag
    # Comments and the like have a function for a tag.
    if not isinstance(tag, str) or tag in DROPPED_TAGS or "hidden" in element.attrib:
        return True
    # The header of an article is its heading, that of the page its navigation.
    if tag == "header" and not any(e.tag in ("article", "main", "section") for e in element.iterancestors()):
        return True
    if element.get("role") in DROPPED_ROLES or DROPPED_CLASSES & set((element.get("class") or "").lower().split()):
        return True
    return element in menus


def _is_tight(element: etree._Element) -> bool:
    """Whether a block is set off by a new line only, without a blank one."""
    parent = element.getparent()
    inside = parent is not None and parent.tag in ("li", "dd", "td", "th")
    return element.tag in ("dd", "tr", "td", "th", "thead", "tbody", "tfoot") or (
        element.tag in ("p", "ul", "ol") and inside
    )


@dataclass
class _Inside:
    """What is inside an element."""

    letters: int = 0
    link_letters: int = 0
    links: int = 0
    has_image: bool = False


def _menus(root: etree._Element) -> set[etree._Element]:
    """Blocks that are menus: almost all of their letters inside links, and no image. One walk, however they nest."""
    menus: set[etree._Element] = set()
    open_elements = [_Inside()]  # what is around the root
    for event, element in etree.iterwalk(root, events=("start", "end")):
        if event == "start":
            open_elements.append(_Inside(letters=_num_letters(element.text)))
            continue
        inside, outer = open_elements.pop(), open_elements[-1]
        if element.tag == "a" and element.get("href"):
            inside.link_letters, inside.links = inside.letters, inside.links + 1
        fewest = LINK_BLOCKS.get(element.tag)
        is_menu = fewest and inside.links >= fewest and inside.link_letters >= LINK_SHARE * inside.letters
        if is_menu and not inside.has_image:
            menus.add(element)
        outer.letters += inside.letters + _num_letters(element.tail)
        outer.link_letters += inside.link_letters
        outer.links += inside.links
        outer.has_image = outer.has_image or inside.has_image or element.tag == "img"
    return menus


def _num_letters(text: str | None) -> int:
    return sum(map(str.isalpha, text)) if text else 0


def _letters(text: str) -> str:
    """Letters only, lower case: what text is when layout, numbers and punctuation are set aside."""
    return "".join(character for character in text.lower() if character.isalpha())
