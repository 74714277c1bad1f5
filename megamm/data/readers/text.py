"""Plain text files: one file is one document."""

import re
from collections.abc import Iterator
from pathlib import Path

from megamm.data.documents import Document, Skipped, Text

SUFFIXES = (".txt", ".text")


def read_text(path: Path, id: str) -> Iterator[Document | Skipped]:
    """Read a UTF-8 file; line ends become \\n, trailing blanks go, blank lines in a row become one."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        yield Skipped(id=id, reason="wrong encoding: not UTF-8")
        return
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    yield Document(id=id, spans=(Text(text=re.sub(r"\n{3,}", "\n\n", text).strip()),))
