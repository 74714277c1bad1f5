"""Jupyter notebooks as HTML pages: text, code and what it gave (https://nbformat.readthedocs.io)."""

import html
import json
from collections.abc import Callable, Iterator

PICTURES = ("image/png", "image/jpeg", "image/webp", "image/gif")


class NotebookError(Exception):
    """A file that is no notebook; the message is a short reason."""


def notebook_page(content: str, render_markdown: Callable[[str], str]) -> str:
    """A notebook as HTML; pictures become data URIs.

    Raises:
        NotebookError: it is not JSON or has no cells.
    """
    try:
        notebook = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NotebookError("not valid JSON") from error
    sheets = [notebook] if isinstance(notebook, dict) else []
    if sheets and "cells" not in notebook:  # format 3 has sheets of cells
        sheets = notebook.get("worksheets") or []
    try:
        cells = [cell for sheet in sheets for cell in sheet["cells"]]
        if not sheets:
            raise NotebookError("it has no cells")
        return "".join(part for cell in cells for part in _cell(cell, render_markdown))
    except (KeyError, TypeError, AttributeError) as error:
        raise NotebookError(f"a cell is not as expected ({error})") from error


def _cell(cell: dict, render_markdown: Callable[[str], str]) -> Iterator[str]:
    kind = cell.get("cell_type")
    source = _text(cell.get("source", cell.get("input", "")))
    if kind == "heading":  # of format 3
        yield f"<h{int(cell.get('level', 1))}>{html.escape(source)}</h{int(cell.get('level', 1))}>"
    elif kind == "code":
        yield _block(source)
        for output in cell.get("outputs") or ():
            yield from _output(output)
    elif kind == "markdown":
        for name, bundle in (cell.get("attachments") or {}).items():
            source = source.replace(f"attachment:{name}", next(_pictures(bundle), ""))
        yield render_markdown(source)
    else:
        yield _block(source)


def _output(output: dict) -> Iterator[str]:
    """The richest form of an output that a reader sees; of errors nothing but their name."""
    if output.get("output_type") == "error":
        yield _block(f"{output.get('ename')}: {output.get('evalue')}")
        return
    data = output.get("data") or {}
    picture = next(_pictures(data), None) or next(
        _pictures({f"image/{n}": output.get(n) for n in ("png", "jpeg")}), None
    )
    if picture:
        yield f'<p><img src="{html.escape(picture)}"></p>'
    elif "text/html" in data:
        yield f"<div>{_text(data['text/html'])}</div>"
    elif "text/markdown" in data:
        yield _block(_text(data["text/markdown"]))
    else:
        yield _block(_text(data.get("text/plain", output.get("text", ""))))


def _pictures(bundle: dict) -> Iterator[str]:
    """Data URIs of the pictures among the forms of one thing."""
    for kind in PICTURES:
        if value := bundle.get(kind):
            yield f"data:{kind};base64,{''.join(_text(value).split())}"


def _text(value: str | list[str]) -> str:
    """Text that may be stored as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def _block(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>" if text.strip() else ""
