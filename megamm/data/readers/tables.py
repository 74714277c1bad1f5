"""Files of many records: JSONL, CSV, webdataset tars, Parquet.

Records are cut off in the main process and parsed by the workers, so that a file larger than memory is read
once, from front to back. What cannot be read is told record by record, or as the rest of its file.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megamm.data.documents import Skipped, Task, given, one_line, printable
from megamm.data.readers.interleaved import FIELDS as INTERLEAVED_FIELDS
from megamm.data.readers.interleaved import is_interleaved
from megamm.data.readers.json_files import json_records
from megamm.data.readers.records import (
    TEXT_FIELDS,
    json_record,
    picture_fields,
    pictures,
    read_json_line,
    read_record,
    text_of,
)
from megamm.data.readers.separated import MAX_LINE, BadRow, read_rows
from megamm.data.readers.streams import COMPRESSED_SUFFIXES, open_stream, without_compression
from megamm.data.readers.tars import tar_kind, tar_tasks
from megamm.errors import InputError

_PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tar")
SUFFIXES = (
    *_PLAIN,
    *(plain + packed for plain in _PLAIN for packed in COMPRESSED_SUFFIXES),
    ".tgz",
    ".parquet",
    ".arrow",
)
SHOWN_SUFFIXES = (*_PLAIN, ".parquet", ".arrow", f"packed or not ({' '.join(COMPRESSED_SUFFIXES)})")
"""For people: every combination would be a page of its own."""

PARQUET_BATCH = 64
PROBE_RECORDS = 1000
"""Records that are looked at to find what a table holds."""


def table_kind(path: Path) -> str:
    """interleaved if one of the first records of a file is a conversation or a web document, caption if one has a
    picture, else text.

    Raises:
        InputError: no record with a text field was found.
    """
    if _format(path) == ".tar":
        return tar_kind(path)
    fields: dict[str, None] = {}
    has_text = has_picture = False
    damage = "it has no records"
    # The first record may lack its picture, so one is not enough.
    for found in islice(_records(path, path.name), PROBE_RECORDS):
        if isinstance(found, Skipped):
            damage = found.reason
            continue
        record = json_record(found[1]) if isinstance(found[1], bytes) else found[1]
        if isinstance(record, dict):
            if is_interleaved(record):
                return "interleaved"
            fields |= dict.fromkeys(map(printable, record))
            has_text, has_picture = has_text or text_of(record) is not None, has_picture or bool(pictures(record))
        else:
            damage = record.reason
        if has_text and has_picture:
            return "caption"
    if not has_text:
        instead = f"it has {', '.join(fields)}" if fields else damage
        wanted = ", ".join((*TEXT_FIELDS, *INTERLEAVED_FIELDS))
        raise InputError(f"{path}: no text field found (one of {wanted}); {instead}")
    return "text"


def table_tasks(path: Path, root: Path, id: str, kind: str) -> Iterator[Task]:
    """Tasks that read the records of ``path`` as documents of ``kind``; a record's id is ``id:number``.

    Pictures are looked for below ``root`` only.
    """
    if _format(path) == ".tar":
        yield from tar_tasks(path, id, kind)
        return
    for found in _records(path, id):
        if isinstance(found, Skipped):
            yield given(found)
        else:
            name, record = found
            read: Callable = read_json_line if isinstance(record, bytes) else read_record
            yield Task(name, partial(read, record, root, path.parent, name, kind))


def _format(path: Path) -> str:
    suffix = Path(without_compression(path.name)).suffix
    return {".tgz": ".tar", ".ndjson": ".jsonl"}.get(suffix, suffix)  # other names of the same


def _records(path: Path, id: str) -> Iterator[tuple[str, dict | bytes] | Skipped]:
    """Id and fields, or line, of each record, and what cannot be read."""
    if _format(path) == ".parquet":
        yield from _parquet_records(path, id)
        return
    if _format(path) == ".arrow":
        yield from _arrow_records(path, id)
        return
    stream, file = open_stream(path)
    with file:
        if _format(path) == ".jsonl":
            yield from _lines(file, id)
        elif _format(path) == ".json":
            yield from json_records(file, id)
        else:
            for number, row in enumerate(read_rows(file, "\t" if _format(path) == ".tsv" else ",")):
                name = f"{id}:{number}"
                yield Skipped(id=name, reason=row.reason) if isinstance(row, BadRow) else (name, row)
        if stream.damage:
            yield Skipped(id=id, reason=f"damaged file: {stream.damage}, the rest is lost")


def _lines(file: BinaryIO, id: str) -> Iterator[tuple[str, bytes] | Skipped]:
    number = 0
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            # The rest of it is passed over in pieces: a file without line ends must not fill the memory.
            while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield Skipped(id=f"{id}:{number}", reason="record over the size limit")
        # Empty lines count on: a record's number is that of its line.
        elif line.strip():
            yield f"{id}:{number}", line
        number += 1


def _parquet_records(path: Path, id: str) -> Iterator[tuple[str, dict] | Skipped]:
    """Rows, group by group; of a damaged group those before the damage."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        names = file.schema_arrow.names
        # From the file's end, before anything is read: rows keep their numbers if a group before them is damaged.
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except Exception as error:  # Arrow raises many kinds on damaged bytes
        yield Skipped(id=id, reason=f"damaged Parquet: {one_line(error)}")
        return
    with file:
        if min(counts, default=0) < 0 or sum(counts) != file.metadata.num_rows:
            detail = f"its row groups name {sum(counts)} rows, its end {file.metadata.num_rows}; some may be missing"
            yield Skipped(id=id, reason=f"damaged Parquet: {detail}")
        # Only what is read: other columns may be large.
        columns = picture_fields(names) or names
        first = 0
        for group, count in enumerate(counts):
            number = first
            try:
                # Group by group: damage in one costs no other.
                for batch in file.iter_batches(PARQUET_BATCH, row_groups=[group], columns=columns):
                    for row in _rows(batch):
                        name = f"{id}:{number}"
                        yield Skipped(id=name, reason=row) if isinstance(row, str) else (name, row)
                        number += 1
                detail = "they are missing"
            except Exception as error:
                detail = one_line(error)
            first = max(first + count, number)  # a damaged count may name fewer rows than there are
            for lost in range(number, first):
                yield Skipped(id=f"{id}:{lost}", reason=f"damaged Parquet: row group {group}, {detail}")


def _arrow_records(path: Path, id: str) -> Iterator[tuple[str, dict] | Skipped]:
    """Rows of an Arrow file or stream, as ``save_to_disk`` of Hugging Face's datasets writes them."""
    number = 0
    try:
        with pa.OSFile(str(path)) as file:
            if file.read(6) == b"ARROW1":
                whole = pa.ipc.open_file(file)
                batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
            else:
                file.seek(0)
                batches = iter(pa.ipc.open_stream(file))
            for batch in batches:
                for row in _rows(batch):
                    name = f"{id}:{number}"
                    yield Skipped(id=name, reason=row) if isinstance(row, str) else (name, row)
                    number += 1
    except Exception as error:  # Arrow raises many kinds on damaged bytes
        yield Skipped(id=id, reason=f"damaged Arrow file: {one_line(error)}, the rest is lost")


def _rows(batch: pa.RecordBatch) -> Iterator[dict | str]:
    """Rows of a batch; a row that is no valid data by itself as the reason."""
    for i in range(len(batch)):
        try:
            # One row at a time, so that one that is not UTF-8 does not take its batch with it.
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield "wrong encoding: record is not UTF-8"
        except Exception as error:
            yield f"damaged record: {one_line(error)}"
