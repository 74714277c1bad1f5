"""JSON files that are one value: lists of records, and COCO's captions."""

import json
from collections.abc import Iterator
from typing import BinaryIO

from megamm.data.documents import Skipped, printable
from megamm.data.readers.interleaved import is_interleaved

MAX_JSON_BYTES = 2 * 2**30
"""Such a file has to be in memory as a whole, and takes some five times its size there."""

RECORD_FIELDS = ("text", "caption", "image")


def json_records(file: BinaryIO, id: str) -> Iterator[tuple[str, dict] | Skipped]:
    """Records of a list, or one record for each picture of COCO's captions.

    Pictures, captions and conversations only: lists of other things with a description lie beside many pages.
    """
    content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        yield Skipped(id=id, reason=f"file over the size limit: at most {MAX_JSON_BYTES} bytes; write it as JSONL")
        return
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        yield Skipped(id=id, reason="wrong encoding: file is not UTF-8")
        return
    except (ValueError, RecursionError) as error:
        yield Skipped(id=id, reason=f"not valid JSON: {error}")
        return
    if isinstance(value, list) and any(_is_record(entry) for entry in value):
        for number, entry in enumerate(value):
            name = f"{id}:{number}"
            good = isinstance(entry, dict)
            yield (name, entry) if good else Skipped(id=name, reason="not valid JSON: a record must be an object")
    elif isinstance(value, dict) and isinstance(value.get("annotations"), list):
        yield from _coco(value, id)
    else:
        entries = value if isinstance(value, list) else [value]
        keys = next((entry for entry in entries if isinstance(entry, dict)), {})
        listed = ", ".join(map(printable, list(keys)[:10])) or "nothing with names"
        yield Skipped(
            id=id, reason=f"JSON of no known layout: expected a list of records or COCO's captions, found {listed}"
        )


def _is_record(entry) -> bool:
    return isinstance(entry, dict) and (is_interleaved(entry) or any(name in entry for name in RECORD_FIELDS))


def _coco(value: dict, id: str) -> Iterator[tuple[str, dict] | Skipped]:
    """One record for each picture, with its captions a line each (https://cocodataset.org/#format-data)."""
    # A picture with five captions as five pairs could not be held out for validation: it would repeat.
    captions: dict[str, list[str]] = {}
    for number, annotation in enumerate(value["annotations"]):
        if isinstance(annotation, dict) and isinstance(annotation.get("caption"), str):
            captions.setdefault(str(annotation.get("image_id")), []).append(annotation["caption"].strip())
        else:
            yield Skipped(id=f"{id}:annotation {number}", reason="annotation without a caption")
    images = value.get("images")
    for image in images if isinstance(images, list) else ():
        key = str(image.get("id")) if isinstance(image, dict) else ""
        lines = captions.pop(key, None)
        if lines and isinstance(image.get("file_name"), str):
            yield f"{id}:{printable(key)}", {"image": image["file_name"], "text": "\n".join(lines)}
        else:
            yield Skipped(id=f"{id}:{printable(key)}", reason="image without a caption or a file_name")
    for key, lines in captions.items():
        yield Skipped(id=f"{id}:{printable(key)}", reason=f"caption of no image in the file: {len(lines)} captions")
