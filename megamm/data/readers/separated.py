"""Rows of CSV and TSV files, also of those with stray quotes, which Python's reader takes for the start of a field
that holds all further rows.
"""

import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

MAX_LINE = 64 * 2**20
"""Characters of a line or a row, above which it is left out."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, and why."""

    reason: str


def read_rows(file: io.BufferedReader, delimiter: str) -> Iterator[dict[str, str] | BadRow]:
    """Records under the names of the first row, or as caption and URL where that row is a record by itself; what
    cannot be read comes as a BadRow.

    Fields may be quoted, and then hold line ends and doubled quotes (RFC 4180). A quote that is never closed, or
    closed in the middle of a field, spoils its line alone: reading goes on at the next one. In tab-separated files
    such a quote is an ordinary character. Bytes that are not UTF-8 become lone surrogates.
    """
    # A mark of UTF-16 is what spreadsheets write.
    encoding = "utf-16" if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    lines = _Lines(io.TextIOWrapper(file, encoding, errors="surrogateescape", newline=""))
    names = None
    while (line := lines.next()) is not None:
        if isinstance(line, BadRow):
            yield line
        elif line.strip():
            row = _read_row(line, lines, delimiter, None if names is None else len(names))
            if isinstance(row, BadRow):
                yield row
            elif names is None:
                names = _names_without_header(row) or row
                if names is not row:
                    yield dict(zip(names, row, strict=True))
            else:
                yield dict(zip(names, row, strict=False))  # a short row lacks its last fields


def _names_without_header(row: list[str]) -> list[str] | None:
    """Names for a first row that is a record by itself: a caption and a URL, in either order (CC3M, CC12M)."""
    urls = [value.startswith(("http://", "https://")) for value in row]
    return ["url" if is_url else "caption" for is_url in urls] if len(row) == 2 and sum(urls) == 1 else None


class _Lines:
    """Lines without their ends, of which some can be put back."""

    def __init__(self, file: io.TextIOBase):
        self._file = file
        self._back: deque[str | BadRow] = deque()

    def next(self) -> str | BadRow | None:
        if self._back:
            return self._back.popleft()
        try:
            line = self._file.readline(MAX_LINE)
            if len(line) == MAX_LINE and line[-1] not in "\r\n":
                while (rest := self._file.readline(MAX_LINE)) and rest[-1] not in "\r\n":
                    pass
                return BadRow("row over the size limit")
        except UnicodeError:  # half a character at the end of a file in UTF-16
            return BadRow("wrong encoding: not UTF-16")
        return line.rstrip("\r\n") if line else None

    def put_back(self, lines: list[str | BadRow]) -> None:
        self._back.extendleft(reversed(lines))  # extendleft turns the order round


def _read_row(line: str, lines: _Lines, delimiter: str, width: int | None) -> list[str] | BadRow:
    """Fields of the row that starts with ``line``; ``width`` is the number that it may have."""
    # Most lines have no quote, and are cut by split alone.
    if '"' in line:
        taken: list[str | BadRow] = []
        row = _quoted(line, lines, taken, delimiter, width)
        if row is not None:
            return row
        lines.put_back(taken)
        # Tab-separated files often have quotes that mean nothing but themselves.
        if delimiter != "\t":
            return BadRow("damaged row: a quote that is not closed, or more fields than the header")
    row = line.split(delimiter)
    if width is not None and len(row) > width:
        return BadRow(f"damaged row: {len(row)} fields, the header has {width}")
    return row


def _quoted(line: str, lines: _Lines, taken: list, delimiter: str, width: int | None) -> list[str] | None:
    """Fields of a row with quotes, further lines of which go to ``taken``; None if they do not fit."""
    row: list[str] = []
    at, size = 0, 0
    # More fields than the header: a quote that was taken for the start of a field was none.
    while width is None or len(row) < width:
        if not line.startswith('"', at):
            end = line.find(delimiter, at)
            row.append(line[at:] if end < 0 else line[at:end])
        else:
            parts, at = [], at + 1
            while True:
                end = line.find('"', at)
                if end < 0:
                    parts.append(line[at:] + "\n")
                    size += len(line)
                    following = lines.next()
                    if following is not None:
                        taken.append(following)
                    # End of the file, a bad line, or a field without end: the quote is not closed.
                    if not isinstance(following, str) or size > MAX_LINE:
                        return None
                    line, at = following, 0
                elif line.startswith('"', end + 1):
                    parts.append(line[at : end + 1])
                    at = end + 2
                else:
                    parts.append(line[at:end])
                    break
            row.append("".join(parts))
            if end + 1 == len(line):
                return row
            end += 1
            if not line.startswith(delimiter, end):  # a quote amid a field
                return None
        if end < 0:
            return row
        at = end + len(delimiter)
    return None
