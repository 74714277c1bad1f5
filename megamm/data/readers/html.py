"""HTML to text and image spans in reading order, without the page's navigation."""

import base64
import binascii
import re
import sys
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

from lxml import etree
from lxml import html as lxml_html

from megamm.data.documents import Image, Text
from megamm.data.images import ImageError, header_size
from megamm.data.readers.page_furniture import is_dropped, menus

LoadImage = Callable[[str], Image | None]
"""Given the ``src`` of an image, its bytes; None if it cannot be had (the callee notes why)."""

PICTURE_TAGS = ("svg", "video", "object", "canvas")
"""Pictures that are not read; told where they stand."""
BLOCKS = frozenset(
    """
    address article aside blockquote body center dd details div dl dt fieldset figcaption figure h1 h2
    h3 h4 h5 h6 header hr li main ol p pre section summary table tbody tfoot thead tr ul caption
    """.split()  # noqa: SIM905
)
MAX_FRAMES = 10_000
"""Calls in each other that it takes to walk a page as deep as the parser allows (2,048 elements)."""
ICON_MAX = 15
"""An image no larger than this on both sides is a bullet or an icon."""
FILE_NAME = re.compile(r"(.*\.|\S+_)(png|jpe?g|gif|svg|webp)", re.IGNORECASE)
"""An alt text that says nothing: the name of the picture's file."""
RAISED = str.maketrans("0123456789+-−=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿ")
LOWERED = str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")
"""Characters of which Unicode has raised and lowered ones."""
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
    builder = _Builder(load_image, note, menus(root))
    mains = root.xpath("//main") or root.xpath("//*[@role='main']")
    # Of several none is known to be the main one.
    content = mains[0] if len(mains) == 1 else root.find("body")
    if content is not None:
        builder.visit(content)
    if title := _title(root, builder.has_heading):
        builder.parts.insert(0, f"{title}\n\n")
    return builder.spans()


def _title(root: etree._Element, has_heading: bool) -> str:
    """What the page is called, where its content does not say it: its heading in what was left out, or its title."""
    headings = root.xpath("//h1")
    if headings:  # such as in a header above the main part
        return "" if has_heading else " ".join(headings[0].text_content().split())
    # A lower heading mostly says the title again.
    return "" if root.xpath("//h2|//h3|//h4") else " ".join((root.findtext("head/title") or "").split())


class _Builder:
    """Collects text and images while walking the tree."""

    def __init__(self, load_image: LoadImage, note: Callable[[str, str], None], menus: set[etree._Element]):
        self.load_image, self.note, self.menus = load_image, note, menus
        self.parts: list[str | _Alt | Image] = []
        self.has_heading = False
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
        if is_dropped(element, self.menus):
            self.dropped(element)
        else:
            tag = element.tag
            self.has_heading |= tag == "h1"
            if tag == "img":
                self.image(element)
            elif tag == "br":
                self.add("\n")
            elif tag in ("sup", "sub"):
                self.script(element)
            elif tag == "math":
                self.formula(element)
            elif tag == "object":
                self.embedded(element)
            elif tag == "pre":
                for end in element.iter("br"):
                    end.tail = "\n" + (end.tail or "")
                # White space of code has a meaning: stand-ins save it from being tidied.
                code = element.text_content().strip("\n").expandtabs()
                self.add("\n\n" + code.replace(" ", _SPACE).replace("\n", _NEWLINE) + "\n\n")
            elif tag == "li":
                self.list_item(element)
            # A row on one line; rows that hold blocks are layout, and are read as such.
            elif tag == "tr" and not any(_is_layout(cell) for cell in element):
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

    def script(self, element: etree._Element) -> None:
        """Raised or lowered signs as such, since 2 to the 32nd is not 232; other text, as in 1st, as it is."""
        text, signs = element.text_content().strip(), RAISED if element.tag == "sup" else LOWERED
        if text and all(ord(character) in signs for character in text):
            self.add(text.translate(signs))
        else:
            self.children(element)

    def formula(self, element: etree._Element) -> None:
        """A formula as its author wrote it in TeX, where the page says so, else its signs in a row."""
        written = element.xpath(".//*[local-name()='annotation'][@encoding='application/x-tex']/text()")
        tex = element.get("alttext") or next(iter(written), None)
        if tex:
            self.add(f"${' '.join(tex.split())}$")
        else:
            for other in element.xpath(".//*[starts-with(local-name(), 'annotation')]"):
                other.drop_tree()
            self.words(element.text_content())

    def embedded(self, element: etree._Element) -> None:
        """A picture that is embedded as an object; of other objects what the page shows in their place."""
        source = element.get("data") or ""
        kind = element.get("type") or ""
        if not kind.startswith("image/") and not re.search(r"\.(png|jpe?g|gif|webp|svgz?)$", source, re.IGNORECASE):
            self.note(source or "object", "object element")
            image = None
        else:
            image = self.load(source)
        if image is None:
            self.children(element)
        else:
            self.show(image, source, " ".join(element.text_content().split()), self.is_alone(element))

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
        return self.show(self.load(source), source, alt, self.is_alone(element))

    def load(self, source: str) -> Image | None:
        """The picture of an address; None if it cannot be had, which is told."""
        if not source.startswith("data:"):
            return self.load_image(source)
        image = load_data_uri(source)
        if image is None:
            self.note(source[:40], "broken image: damaged data URI")
        return image

    def show(self, image: Image | None, source: str, alt: str, is_alone: bool) -> None:
        """Add a picture, if there is one, and its alternative text.

        Args:
            is_alone: whether no text stands beside it in its block.
        """
        if image is not None:
            try:
                if max(header_size(image.data)) <= ICON_MAX:
                    return self.note(source[:200], f"icon: at most {ICON_MAX} pixels a side")
            except ImageError:
                pass  # kept: preparation lists it as broken
            self.parts.append(image)
        if alt and not FILE_NAME.fullmatch(alt):
            self.parts.append(_Alt(alt + ("\n\n" if is_alone else " ")))
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
        # Pictures of one kind may all have the same alt text: each keeps its own.
        texts = [i for i in near if not isinstance(self.parts[i], _Alt)]
        before = "".join(self._letters(i)[1] for i in texts if i < index)
        after = "".join(self._letters(i)[0] for i in texts if i > index)
        if not alt:  # the number of a key or a callout
            return not any(character.isalnum() for character in str(self.parts[index]))
        return alt in before[-ALT_WINDOW:] or alt in after[:ALT_WINDOW]

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


def _is_layout(cell: etree._Element) -> bool:
    """Whether a cell holds more than a line of text: a picture, or blocks other than one paragraph."""
    inside = [e for e in cell.iterdescendants() if e.tag in BLOCKS or e.tag in ("img", "object", "br")]
    return len(inside) > 1 or any(e.tag not in ("p", "div", "br") for e in inside)


def _is_tight(element: etree._Element) -> bool:
    """Whether a block is set off by a new line only, without a blank one."""
    parent = element.getparent()
    inside = parent is not None and parent.tag in ("li", "dd", "td", "th")
    return element.tag in ("dd", "tr", "td", "th", "thead", "tbody", "tfoot") or (
        element.tag in ("p", "ul", "ol") and inside
    )


def _letters(text: str) -> str:
    """Letters only, lower case: what text is when layout, numbers and punctuation are set aside."""
    return "".join(character for character in text.lower() if character.isalpha())
