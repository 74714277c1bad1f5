"""Markdown as HTML, with the marks that site generators add: admonitions, tabs, containers and attributes."""

import re
from functools import lru_cache
from textwrap import dedent

from markdown_it import MarkdownIt

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_BOX = re.compile(r"""( *)(?:!!!|\?\?\?\+?|===[!+]?)(?!=)\s*([\w -]*?)\s*(?:"(.*)")?\s*""")
"""MkDocs Material: `!!! note "Title"`, `??? tip`, `=== "Tab"`; what belongs to it is indented by four."""
_CONTAINER = re.compile(r" *:{3,} *(?:\{?([\w-]+)\}?)?(?:\[(.*)\]| +(.*?))? *")
"""Docusaurus and MyST: `:::tip Title` or `:::{note}`, up to a line of colons alone."""
_ATTRIBUTES = re.compile(r"(?<=[)\]`*]) ?\{:?\s*(?:[.#][\w-]+|[\w-]+=)[^{}]*\}|\s+\{[:.#][^{}]*\}\s*$")
"""`{ width=300 }` behind a picture or a link, `{#name .class}` at the end of a heading."""


def render_markdown(text: str) -> str:
    """Markdown as HTML; tables, raw HTML, and the dialects of MkDocs Material, Docusaurus and MyST are understood."""
    return _markdown().render("\n".join(_plain(text.split("\n"))))


@lru_cache(maxsize=1)
def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": True}).enable("table")


def _plain(lines: list[str]) -> list[str]:
    """The same page in plain Markdown: titles of boxes and tabs as paragraphs, their content after these."""
    found: list[str] = []
    fence, i = "", 0
    while i < len(lines):
        line, i = lines[i], i + 1
        mark = _FENCE.match(line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) else fence
            found.append(line)
        elif mark:
            fence = mark[1]  # nothing in code is a mark
            found.append(line)
        elif (box := _BOX.fullmatch(line)) and (end := _end_of_box(lines, i, len(box[1]))) > i:
            # Read as a page of its own, since boxes hold tabs, and tabs boxes.
            inside = _plain(dedent("\n".join(lines[i:end])).split("\n"))
            title, i = box[3] if box[3] is not None else box[2].split(" ")[0].capitalize(), end
            found += ["", *(box[1] + inner for inner in (title, "", *inside)), ""]
        elif container := _CONTAINER.fullmatch(line):
            title = container[2] or container[3] or (container[1] or "").capitalize()
            found += ["", title, ""]
        else:
            found.append(_ATTRIBUTES.sub("", line))
    return found


def _end_of_box(lines: list[str], start: int, indent: int) -> int:
    """The line after those that are indented by four more than a box's first; blank ones among them count."""
    end = start
    for i in range(start, len(lines)):
        if not lines[i].strip():
            continue
        if len(lines[i]) - len(lines[i].lstrip()) < indent + 4:
            break
        end = i + 1
    return end
