"""What of a web page is not its content: navigation, headers, footers, forms and blocks of links."""

from dataclasses import dataclass

from lxml import etree

DROPPED_TAGS = frozenset(
    """
    script style nav footer head template noscript iframe button select textarea input svg
    audio video canvas dialog
    """.split()  # noqa: SIM905
)
CONTENT_TAGS = ("h1", "h2", "h3", "p", "pre", "article", "table")
"""A form without any of these is a search box or a login; one with them is the page, as some frameworks make it."""
DROPPED_ROLES = frozenset(("navigation", "search", "contentinfo", "banner"))
DROPPED_CLASSES = frozenset(
    """
    navheader navfooter nav navbar navigation navigationbar breadcrumb breadcrumbs sphinxsidebar
    related toc menu footer headerlink skip-link indexdiv reportbug navinextprevious
    docnav sphx-glr-footer sphx-glr-signature sphx-glr-download-link-note
    """.split()  # noqa: SIM905
)
LINK_BLOCKS = {"ul": 1, "ol": 1, "dl": 1, "p": 2, "table": 2, "div": 3}
"""Blocks that are navigation if nearly all their text is links, and the fewest links it takes."""
LINK_SHARE = 0.9


def is_dropped(element: etree._Element, menus: set[etree._Element]) -> bool:
    """Whether an element is left out, with all that is in it; ``menus``: from :func:`menus`."""
    tag = element.tag
    if tag == "form" and not any(True for _ in element.iter(*CONTENT_TAGS)):
        return True
    # Comments and the like have a function for a tag.
    if not isinstance(tag, str) or tag in DROPPED_TAGS or "hidden" in element.attrib:
        return True
    # The header of an article is its heading, that of the page its navigation.
    if tag == "header" and not any(e.tag in ("article", "main", "section") for e in element.iterancestors()):
        return True
    if element.get("role") in DROPPED_ROLES or DROPPED_CLASSES & set((element.get("class") or "").lower().split()):
        return True
    return element in menus


@dataclass
class _Inside:
    """What is inside an element."""

    letters: int = 0
    link_letters: int = 0
    links: int = 0
    has_image: bool = False


def menus(root: etree._Element) -> set[etree._Element]:
    """Blocks that are menus: almost all of their letters inside links, and no image. One walk, however they nest."""
    found: set[etree._Element] = set()
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
            found.add(element)
        outer.letters += inside.letters + _num_letters(element.tail)
        outer.link_letters += inside.link_letters
        outer.links += inside.links
        outer.has_image = outer.has_image or inside.has_image or element.tag == "img"
    return found


def _num_letters(text: str | None) -> int:
    return sum(map(str.isalpha, text)) if text else 0
