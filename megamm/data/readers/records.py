"""Records of tables: which fields are text and pictures, and a record as a document."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from megamm.data.documents import Document, Image, Skipped, Text
from megamm.data.readers.captions import IMAGE_SUFFIXES, VECTOR_SUFFIXES, captioned
from megamm.data.readers.html import load_data_uri
from megamm.data.readers.interleaved import FIELDS as INTERLEAVED_FIELDS
from megamm.data.readers.interleaved import MISSING, BadRecordError, is_conversation, is_interleaved, parts
from megamm.data.readers.streams import RefusedError, read_picture

TEXT_FIELDS = ("text", "caption", "description", "content")
IMAGE_FIELDS = ("image", "images", "image_path", "img", "jpg", "jpeg", "png", "webp")
FILE_FIELDS = ("file_name", "filename", "file", "path")
"""Hold a picture only if they name a file of pictures: tables of code have them too."""
URL_FIELDS = ("url", "image_url")
CAPTION_FIELDS = ("caption", "description")
"""Text that tells of a picture: a URL beside it is a picture's, whatever its name."""
SIZE_FIELDS = ("width", "height", "original_width", "original_height")
"""Only of pictures: a URL beside them is a picture's, too (LAION, COYO)."""


def pick(fields, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that is among ``fields``, as it is written there (upper or lower case)."""
    # Found whatever the case, but looked up as it is written.
    written = {field.lower(): field for field in fields if isinstance(field, str)}
    return next((written[name] for name in names if name in written), None)


def picture_fields(fields) -> list[str]:
    """Fields that may hold a text or pictures."""
    single = (*IMAGE_FIELDS, *FILE_FIELDS, *URL_FIELDS, *INTERLEAVED_FIELDS, *SIZE_FIELDS)
    names = (TEXT_FIELDS, *((name,) for name in dict.fromkeys(single)))
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
        # Tables of source code: an SVG's path beside its source is no picture.
        if pick(record, TEXT_FIELDS) == pick(record, ("content",)) and str(value).lower().endswith(VECTOR_SUFFIXES):
            continue
        if isinstance(value, bytes) or _names_picture(value):
            return [value]
    for name in URL_FIELDS:
        value = record.get(pick(record, (name,)))
        if not value or not isinstance(value, str):
            continue
        told = pick(record, CAPTION_FIELDS) or pick(record, SIZE_FIELDS)
        if _names_picture(value) or told:
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
    if kind == "interleaved":
        yield from _read_interleaved(record, root, folder, id)
        return
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


def _read_interleaved(record: dict, root: Path, folder: Path, id: str) -> Iterator[Document | Skipped]:
    """A web document without the pictures that cannot be had, or a conversation, which is nothing without them."""
    if not is_interleaved(record):
        yield Skipped(id=id, reason=f"no conversation or web document: none of {', '.join(INTERLEAVED_FIELDS)}")
        return
    try:
        spans: list[Text | Image] = []
        for number, part in enumerate(parts(record, pictures(record))):
            if isinstance(part, list):
                try:
                    spans.append(_load(part[0], root, folder))
                except RefusedError as error:
                    if is_conversation(record):
                        raise
                    yield Skipped(id=f"{id}: image {number}", reason=str(error))
            elif part:
                spans.append(Text(text=part))
    except (BadRecordError, RefusedError) as error:
        yield Skipped(id=id, reason=str(error))
    else:
        files = tuple(span.file for span in spans if isinstance(span, Image) and span.file)
        yield Document(id=id, spans=tuple(spans), files=files)


def _load(value, root: Path, folder: Path) -> Image:
    if value == MISSING:
        raise RefusedError("image not found")
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
        url = urlsplit(value) if "://" in value else None
    except ValueError as error:
        raise RefusedError("remote image") from error
    if url is not None and url.netloc:
        return _downloaded(url, root, folder)
    if value.lower().endswith(VECTOR_SUFFIXES):
        raise RefusedError("SVG image")
    return read_picture(_place(value, root, folder), root, value)


def _downloaded(url: SplitResult, root: Path, folder: Path) -> Image:
    """The picture of a URL that was loaded before: ``HOST/PATH``, as ``wget -x`` and its like lay it down.

    Raises:
        RefusedError: it is not there, or cannot be read.
    """
    name = f"{url.netloc}{unquote(url.path)}"  # without ?query and #fragment
    try:
        place = _place(name, root, folder)
        if not os.path.lexists(place):
            raise RefusedError("remote image")
    except ValueError as error:  # a NUL in the name
        raise RefusedError("remote image") from error
    return read_picture(place, root, name)


def _place(name: str, root: Path, folder: Path) -> Path:
    """Where a picture lies: beside its table, in the input folder, or in one folder below that.

    Raises:
        RefusedError: it could be one of several.
    """
    # COCO and LLaVA keep tables and pictures in folders beside each other.
    if os.path.lexists(folder / name) or ".." in Path(name).parts:
        return folder / name
    found = [place for place in (root, *_folders(root)) if os.path.lexists(place / name)]
    if len(found) > 1 and found[0] != root:
        raise RefusedError(f"image in several folders: {', '.join(place.name for place in found)}")
    return (found or [folder])[0] / name


@lru_cache(maxsize=8)
def _folders(root: Path) -> list[Path]:
    """Folders in the input folder."""
    return sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))


def _names_picture(value) -> bool:
    """Whether a value is the path or URL of a picture, by its suffix."""
    # A URL may have a query behind the suffix.
    return isinstance(value, str) and value.partition("?")[0].lower().endswith((*IMAGE_SUFFIXES, *VECTOR_SUFFIXES))
