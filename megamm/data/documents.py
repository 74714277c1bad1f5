"""Documents: what every reader and generator yields, before tokens and patches."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Text:
    """A span of text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Image:
    """A span that is one picture: the bytes of an encoded file (PNG, JPEG, ...), and where they came from.

    Attributes:
        name: for people.
        file: path of the input file, where it is one by itself.
    """

    data: bytes
    name: str = ""
    file: str = ""


@dataclass(frozen=True, kw_only=True)
class Document:
    """Spans in reading order.

    Attributes:
        id: unique in its source and stable between runs.
        files: paths of the pictures that it refers to, used or not.
    """

    id: str
    spans: tuple[Text | Image, ...]
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An input that was left out, and why; inputs are counted by the words of the reason before its first colon."""

    id: str
    reason: str


@dataclass(frozen=True)
class Task:
    """Something to read, in any process.

    Attributes:
        id: names it if reading fails.
        read: gives its documents, and what had to be left out.
    """

    id: str
    read: Callable[[], Iterable[Document | Skipped]]

    def __call__(self) -> Iterator[Document | Skipped]:
        """What ``read`` gives; an exception, whatever a library makes of odd bytes, is one more thing left out."""
        try:
            yield from self.read()
        except Exception as error:
            yield unread(self.id, error)


def unread(id: str, error: Exception) -> Skipped:
    """An input whose reading ended in an exception that nobody expected."""
    return Skipped(id=id, reason=f"cannot be read: {type(error).__name__}, {one_line(error)}")


def printable(name: str) -> str:
    """A file's name as text that can be stored: bytes that are not UTF-8 become ``\\xNN``."""
    # Python keeps bytes of file names that are not UTF-8 as lone surrogates, which no file in UTF-8 can hold.
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def one_line(error: BaseException) -> str:
    """What an error of a library says, short and on one line; its kind where it says nothing."""
    return printable(" ".join(str(error).split())[:200] or type(error).__name__)


def given(*items: Document | Skipped) -> Task:
    """The task that gives what is known already."""
    return Task(items[0].id, items.__iter__)
