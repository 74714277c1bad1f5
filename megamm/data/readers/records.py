"""Records of tables: which fields are text and pictures, and a record as a document."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from megamm.data.documents import Document, Image, Skipped, Text
from megamm.data.readers.captions import IMAGE_SUFFIXES, VECTOR_SUFFIXES, captioned
from megamm.data.readers.html import load_data_uri
from megamm.data.readers.streams import RefusedError, read_picture

TEXT_FIELDS = ("text", "caption", "description", "content")
IMAGE_FIELDS = ("image", "images", "image_path", "img", "jpg", "jpeg", "png", "webp")
FILE_FIELDS = ("file_name", "filename", "file", "path")
"""Hold a picture only if they name a file of pictures: tables of code have them too."""
URL_FIELDS = ("url", "image_url")
CAPTION_FIELDS = ("caption", "description")
"""Text that tells of a picture: a URL beside it is a picture's, whatever its name."""


def pick(fields, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that is among ``fields``, as it is written there (upper or lower case)."""
    # Found whatever the case, but looked up as it is written.
    written = {field.lower(): field for field in fields if isinstance(field, str)}
    return next((written[name] for name in names if name in written), None)


def picture_fields(fields) -> list[str]:
    """Fields that may hold a text or pictures."""
    names = (TEXT_FIELDS, *((name,) for name in (*IMAGE_FIELDS, *FILE_FIELDS, *URL_FIELDS)))
    return [field for field in (pick(fields, name) for name in names) if field is not None]


def text_of(record: dict) -> str | None:
    """The text of a record."""
    values = (record.get(pick(record, (name,))) for name in TEXT_FIELDS)
    return next((value for value in values if isinstance(value, str)), None)


def pictures(record: dict) -> list:
    """What a record has as pictures: bytes, ``{"bytes": ..., "path": ...}`` or names of files."""
    # In the order of how surely a field holds a picture.
    for name in IMAGE_FIELDS:
        value = record.get(pick(record, (name,)))
        if value:  # a null beside another field that has one
            return value if isinstance(value, list) else [value]
    for name in FILE_FIELDS:
        value = record.get(pick(record, (name,)))
        if isinstance(value, bytes) or _names_picture(value):
            return [value]
    for name in URL_FIELDS:
        value = record.get(pick(record, (name,)))
        if value and isinstance(value, str) and (_names_picture(value) or pick(record, TEXT_FIELDS) in CAPTION_FIELDS):
            return [value]
    return []


def json_record(line: bytes) -> dict | Skipped:
    """The record of a line of a JSONL file, or why it is none."""
    try:
        record = json.loads(line.decode("utf-8-sig"))  # with the mark of the first line
    except UnicodeDecodeError:
        return Skipped(id="", reason="wrong encoding: record is not UTF-8")
    except (ValueError, RecursionError):
        return Skipped(id="", reason="not valid JSON")
    return record if isinstance(record, dict) else Skipped(id="", reason="not valid JSON: a record must be an object")


def read_json_line(line: bytes, root: Path, folder: Path, id: str, kind: str) -> Iterator[Document | Skipped]:
    """One line of a JSONL file."""
    record = json_record(line)
    if isinstance(record, Skipped):
        yield replace(record, id=id)
    else:
        yield from read_record(record, root, folder, id, kind)


def read_record(record: dict, root: Path, folder: Path, id: str, kind: str) -> Iterator[Document | Skipped]:
    """A record with a text and, for captions, one or more pictures, which come before it.

    Names of files are looked up from ``folder``, and have to lie in ``root``.
    """
    text, found = text_of(record), pictures(record)
    if text is None:
        yield Skipped(id=id, reason="no text field")
    elif kind == "text":
        if found:
            yield Skipped(id=f"{id}: image", reason="image of a record that is read as text")
        yield Document(id=id, spans=(Text(text=text.strip()),))
    elif not found:
        yield Skipped(id=id, reason="no image field")
    else:
        try:
            images = [_load(value, root, folder) for value in found]
        except RefusedError as error:
            yield Skipped(id=id, reason=str(error))
        else:
            yield captioned(id, images, text)


def _load(value, root: Path, folder: Path) -> Image:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")  # as Hugging Face's datasets store pictures
    if isinstance(value, bytes):
        return Image(data=value)
    if not isinstance(value, str) or not value:
        raise RefusedError("no image field: neither bytes nor the name of a file")
    if value.startswith("data:"):
        image = load_data_uri(value)
        if image is None:
            raise RefusedError("broken image: damaged data URI")
        return image
    try:
        # Nothing is fetched: a corpus that depends on the network is another one each time.
        remote = "://" in value and bool(urlsplit(value).netloc)
    except ValueError:
        remote = True
    if remote:
        raise RefusedError("remote image")
    if value.lower().endswith(VECTOR_SUFFIXES):
        raise RefusedError("SVG image")
    return read_picture(folder / value, root, value)


def _names_picture(value) -> bool:
    """Whether a value is the path or URL of a picture, by its suffix."""
    # A URL may have a query behind the suffix.
    return isinstance(value, str) and value.partition("?")[0].lower().endswith((*IMAGE_SUFFIXES, *VECTOR_SUFFIXES))
