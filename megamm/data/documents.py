"""Documents: what every reader and generator yields, before tokens and patches."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Text:
    """A span of text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Image:
    """A span that is one picture: the bytes of an encoded file (PNG, JPEG, ...) and where they came from."""

    data: bytes
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Document:
    """Spans in reading order. ``id`` is unique in its source and stable between runs."""

    id: str
    spans: tuple[Text | Image, ...]


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An input that was left out, and why."""

    id: str
    reason: str
