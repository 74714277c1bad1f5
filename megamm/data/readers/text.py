"""Plain text files: one file is one document."""

import re
from collections.abc import Iterator
from pathlib import Path

from megamm.data.documents import Document, Skipped, Text
from megamm.data.readers.streams import RefusedError, decode_text, read_file

SUFFIXES = (".txt", ".text")


def read_text(path: Path, root: Path, id: str) -> Iterator[Document | Skipped]:
    """Read a UTF-8 file below ``root``; line ends become \\n, trailing blanks go, blank lines in a row become one."""
    try:
        text = decode_text(read_file(path, root))
    except UnicodeDecodeError:
        yield Skipped(id=id, reason="wrong encoding: not UTF-8")
        return
    except RefusedError as error:
        yield Skipped(id=id, reason=str(error))
        return
    # Not splitlines, which also cuts at form feeds and the like.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    text = "\n".join(line.rstrip(" \t") for line in lines)
    yield Document(id=id, spans=(Text(text=re.sub(r"\n{3,}", "\n\n", text).strip()),))
