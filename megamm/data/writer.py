"""Writing a prepared dataset: cutting documents that are too long into rows, and rows into shards."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from megamm.data.shards import SCHEMA
from megamm.data.tokens import BOS, IMAGE_END

MIN_TEXT_AFTER_IMAGE = 8
"""An image with less room than this behind it starts a new row: without text after it, it teaches nothing."""

SHARD_DOCUMENTS = 4096
SHARD_BYTES = 256 * 2**20


@dataclass(kw_only=True)
class ShardRow:
    """One row of a shard (see megamm.data.shards): a document, or a part of a long one.

    Attributes:
        id: the document's id, with ``#1``, ``#2``, ... from the second part on.
        tokens: ids of all text spans.
        layout: n > 0 text tokens, -n patches.
        images: encoded images.
        length: positions: text tokens and patches.
    """

    id: str
    tokens: list[int] = field(default_factory=lambda: [BOS])
    layout: list[int] = field(default_factory=lambda: [1])
    images: list[bytes] = field(default_factory=list)
    length: int = 1

    def add_text(self, ids: Sequence[int]) -> None:
        """Append text tokens."""
        if not ids:
            return
        self.tokens += ids
        self.length += len(ids)
        if self.layout[-1] > 0:
            self.layout[-1] += len(ids)
        else:
            self.layout.append(len(ids))

    def add_image(self, data: bytes, num_patches: int) -> None:
        """Append an image and its <image_end>."""
        self.images.append(data)
        self.layout.append(-num_patches)
        self.length += num_patches
        self.add_text([IMAGE_END])

    def num_bytes(self) -> int:
        """Size on disk, nearly."""
        return 4 * len(self.tokens) + sum(map(len, self.images))


def split_rows(id: str, units: Sequence[list[int] | bytes], max_length: int, num_patches: int) -> list[ShardRow]:
    """Cut a document into rows of at most ``max_length`` positions, each starting with <bos>.

    Text may be cut anywhere; an image and its <image_end> stay together. ``max_length`` must hold
    <bos>, an image, <image_end> and one token more.

    Args:
        units: text ids and encoded images; the last is text that ends with <eos>.
    """
    rows = [ShardRow(id=id)]

    def next_row() -> None:
        rows.append(ShardRow(id=f"{id}#{len(rows)}"))

    for index, unit in enumerate(units):
        if isinstance(unit, bytes):
            need = min(num_patches + 1 + MIN_TEXT_AFTER_IMAGE, max_length - 1)
            if rows[-1].length + need > max_length:
                next_row()
            rows[-1].add_image(unit, num_patches)
            continue
        start = 0
        while start < len(unit):
            take = min(len(unit) - start, max_length - rows[-1].length)
            if index == len(units) - 1 and 0 < take == len(unit) - start - 1:
                take -= 1  # <eos> never stands alone in a row
            rows[-1].add_text(unit[start : start + take])
            start += take
            if start < len(unit):
                next_row()
    return rows


class ShardWriter:
    """Writes the rows of one split: ``shard-00000.arrow``, ... and ``lengths.npy``."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self._rows: list[ShardRow] = []
        self._num_bytes = 0
        self._shards: list[dict] = []
        self._lengths: list[tuple[int, int]] = []
        self._num_images = 0

    def add(self, rows: Sequence[ShardRow]) -> None:
        """Append rows; a full shard goes to disk."""
        for row in rows:
            self._rows.append(row)
            self._num_bytes += row.num_bytes()
            self._lengths.append((len(row.tokens), row.length - len(row.tokens)))
            self._num_images += len(row.images)
            if len(self._rows) >= SHARD_DOCUMENTS or self._num_bytes >= SHARD_BYTES:
                self._flush()

    def close(self) -> dict:
        """Write what is left; returns the split's entry of ``dataset.json``."""
        self._flush()
        lengths = np.array(self._lengths, dtype=np.int32).reshape(-1, 2)
        np.save(self.folder / "lengths.npy", lengths)
        text, patches = lengths.sum(axis=0, dtype=np.int64).tolist()
        return {
            "num_documents": len(lengths),
            "num_text_tokens": text,
            "num_patches": patches,
            "num_images": self._num_images,
            "shards": self._shards,
        }

    def _flush(self) -> None:
        if not self._rows:
            return
        name = f"shard-{len(self._shards):05d}.arrow"
        columns = {column: [getattr(row, column) for row in self._rows] for column in SCHEMA.names}
        table = pa.Table.from_pydict(columns, schema=SCHEMA)
        with pa.OSFile(str(self.folder / name), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            writer.write_table(table)
        self._shards.append({"file": name, "num_documents": len(self._rows)})
        self._rows, self._num_bytes = [], 0
