"""Files of many records: JSONL, CSV, webdataset tars, Parquet.

Records are cut off in the main process and parsed by the workers, so that a file larger than memory is read
once, from front to back. Each function yields tasks: callables that give documents.
"""

import csv
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from megamm.data.documents import Document, Image, Skipped, Text
from megamm.data.readers.captions import IMAGE_SUFFIXES, captioned
from megamm.errors import InputError

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".tar", ".parquet")
IMAGE_FIELDS = ("image", "image_path", "file_name", "filename", "file", "path", "jpg", "png")
TEXT_FIELDS = ("text", "caption", "description", "content")

PARQUET_BATCH = 64


def pick(fields, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that is among ``fields``."""
    return next((name for name in names if name in fields), None)


def table_kind(path: Path) -> str:
    """caption if the records of a file name an image, else text.

    Raises:
        InputError: the first record has no text field.
    """
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return "caption"
    if suffix == ".parquet":
        fields = _parquet(path).schema_arrow.names
    elif suffix in (".csv", ".tsv"):
        fields = _csv_reader(path).fieldnames or []
    else:
        fields = next(_json_fields(path), [])
    if pick(fields, TEXT_FIELDS) is None:
        raise InputError(
            f"{path}: no text field found (one of {', '.join(TEXT_FIELDS)}); it has {', '.join(fields) or 'none'}"
        )
    return "caption" if pick(fields, IMAGE_FIELDS) else "text"


def table_tasks(path: Path, id: str, kind: str) -> Iterator[partial]:
    """Tasks that read the records of ``path`` as documents of ``kind``; a record's id is ``id:number``."""
    suffix = path.suffix.lower()
    if suffix == ".tar":
        yield from _tar_tasks(path, id)
    elif suffix == ".parquet":
        file = _parquet(path)
        fields = [f for f in (pick(file.schema_arrow.names, n) for n in (TEXT_FIELDS, IMAGE_FIELDS)) if f]
        number = 0
        for batch in file.iter_batches(PARQUET_BATCH, columns=fields):
            for row in batch.to_pylist():
                yield partial(read_record, row, path.parent, f"{id}:{number}", kind)
                number += 1
    elif suffix in (".csv", ".tsv"):
        for number, row in enumerate(_csv_reader(path)):
            yield partial(read_record, row, path.parent, f"{id}:{number}", kind)
    else:
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    yield partial(read_json_line, line, path.parent, f"{id}:{number}", kind)


def read_json_line(line: bytes, folder: Path, id: str, kind: str) -> Iterator[Document | Skipped]:
    """One line of a JSONL file."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        yield Skipped(id=id, reason="wrong encoding: record is not UTF-8")
    except (ValueError, RecursionError):
        yield Skipped(id=id, reason="not valid JSON")
    else:
        if isinstance(record, dict):
            yield from read_record(record, folder, id, kind)
        else:
            yield Skipped(id=id, reason="not valid JSON: a record must be an object")


def read_record(record: dict, folder: Path, id: str, kind: str) -> Iterator[Document | Skipped]:
    """A record with a text field and, for captions, an image: bytes, ``{"bytes": ...}`` or a file name."""
    text = record.get(pick(record, TEXT_FIELDS))
    if not isinstance(text, str):
        yield Skipped(id=id, reason="no text field")
        return
    if kind == "text":
        yield Document(id=id, spans=(Text(text=text.strip()),))
        return
    image = record.get(pick(record, IMAGE_FIELDS))
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image:
        try:
            image = (folder / image).read_bytes()
        except (OSError, ValueError):
            yield Skipped(id=id, reason="image not found")
            return
    if isinstance(image, bytes):
        yield captioned(id, Image(data=image), text)
    else:
        yield Skipped(id=id, reason="no image field")


def _json_fields(path: Path) -> Iterator[list[str]]:
    """Field names of each record that can be read."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield list(record)


def _csv_reader(path: Path) -> csv.DictReader:
    # A byte that is not UTF-8 becomes a lone surrogate, by which preparation knows the bad row.
    file = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    return csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({error})") from error


def _tar_tasks(path: Path, id: str) -> Iterator[partial]:
    """Image and caption pairs of a webdataset tar: consecutive members alike up to the first dot."""
    key, sample = None, {}

    def finished() -> Iterator[partial]:
        if sample:
            yield partial(read_record, dict(sample), Path(), f"{id}:{key}", "caption")

    try:
        with tarfile.open(path) as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not member.isfile() or not stem:
                    continue
                if folder + slash + stem != key:
                    yield from finished()
                    key, sample = folder + slash + stem, {}
                content = tar.extractfile(member).read()
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    sample["image"] = content
                elif suffix in ("txt", "text", "caption"):
                    sample["text"] = content.decode("utf-8", errors="surrogateescape")
            yield from finished()
    except tarfile.TarError as error:
        yield from finished()
        yield partial(_damaged, f"{id}: rest", str(error))


def _damaged(id: str, detail: str) -> Iterator[Skipped]:
    yield Skipped(id=id, reason=f"damaged tar: {detail}")
