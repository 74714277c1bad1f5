"""Markdown as HTML, with the marks that site generators add: admonitions, tabs, containers and attributes."""

import re
from functools import lru_cache

from markdown_it import MarkdownIt

BOX_INDENT = 4
"""Of what belongs to a box, at least."""

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# Of lines without blanks around them: a pattern of several runs of blanks would try all ways to share out a long one.
_BOX = re.compile(r"(?:!!!|\?\?\?\+?|===[!+]?)(?!=)([\w -]*)(?:\"(.*)\")?")
"""MkDocs Material: `!!! note "Title"`, `??? tip`, `=== "Tab"`; what belongs to it is indented by four."""
_CONTAINER = re.compile(r":{3,}\s*(?:\{?([\w-]+)\}?)?(\[.*\]|\s.*)?")
"""Docusaurus and MyST: `:::tip Title`, `:::tip[Title]` or `:::{note}`, up to a line of colons alone."""
_ATTRIBUTES = re.compile(r"(?<=[)\]`*]) ?\{:?\s*(?:[.#][\w-]+|[\w-]+=)[^{}]*\}|(?<!\s)\s+\{[:.#][^{}]*\}\s*$")
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
    fence = ""
    boxes: list[tuple[int, int]] = []  # that a line may be in: own indent, and how much further its content is indented
    for line, next_indent in zip(lines, _next_indents(lines), strict=True):
        indent = _indent(line)
        if line.strip():
            while boxes and indent < boxes[-1][0] + BOX_INDENT:
                boxes.pop()
                fence = ""  # the end of a box ends what was open in it
                found.append("")
        shift = sum(more for _, more in boxes)
        line = line[min(indent, shift) :]
        mark = _FENCE.match(line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) else fence
            found.append(line)
        elif mark:
            fence = mark[1]  # nothing in code is a mark
            found.append(line)
        elif (box := _BOX.fullmatch(line.strip())) and next_indent >= indent + BOX_INDENT:
            title = box[2] if box[2] is not None else box[1].strip().split(" ")[0].capitalize()
            found += ["", " " * _indent(line) + title, ""]
            boxes.append((indent, next_indent - indent))
        elif container := _CONTAINER.fullmatch(line.strip()):
            title = (container[2] or "").strip().removeprefix("[").removesuffix("]")
            found += ["", title or (container[1] or "").capitalize(), ""]
        else:
            found.append(_ATTRIBUTES.sub("", line))
    return found


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _next_indents(lines: list[str]) -> list[int]:
    """Of each line the indent of the next one that is not blank; -1 behind the last."""
    found, known = [], -1
    for line in reversed(lines):
        found.append(known)
        known = _indent(line) if line.strip() else known
    return found[::-1]
