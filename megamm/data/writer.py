"""Writing a prepared dataset: cutting documents that are too long into pieces, and pieces into shards."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megamm.data.dataset_info import Fingerprint
from megamm.data.shards import SCHEMA, document_digest, lengths_digest
from megamm.sequence import BOS, IMAGE_END

MIN_TEXT_AFTER_IMAGE = 8
"""An image with less room than this behind it starts a new piece: without text after it, it teaches nothing."""

SHARD_DOCUMENTS = 4096
SHARD_BYTES = 256 * 2**20  # held in memory while a shard is put together
PACK_PIECES = 64
"""Pieces that are put into columns at a time."""


@dataclass(kw_only=True)
class Piece:
    """One entry of a shard (see megamm.data.shards): a document, or a piece of a long one.

    Attributes:
        id: the document's id, with ``#1``, ``#2``, ... from the second piece on.
        tokens: ids of all text spans.
        layout: n > 0 text tokens, -n patches.
        images: encoded images.
        length: positions: text tokens and patches.
        digest: of all that is stored, set by :meth:`seal`.
    """

    id: str
    tokens: list[int] = field(default_factory=lambda: [BOS])
    layout: list[int] = field(default_factory=lambda: [1])
    images: list[bytes] = field(default_factory=list)
    length: int = 1
    digest: bytes = b""

    def seal(self) -> "Piece":
        """Set the digest, once the piece is complete; here, and not while writing, since workers do it."""
        self.digest = document_digest(self.id, self.tokens, self.layout, self.images)
        return self

    def add_text(self, ids: Sequence[int]) -> None:
        """Append text tokens."""
        if not ids:
            return
        self.tokens += ids
        self.length += len(ids)
        # Spans alternate: text that follows text is one span.
        if self.layout[-1] > 0:
            self.layout[-1] += len(ids)
        else:
            self.layout.append(len(ids))

    def add_image(self, data: bytes, num_patches: int) -> None:
        """Append an image and its <image_end>."""
        self.images.append(data)
        self.layout.append(-num_patches)
        self.length += num_patches
        # Part of the text: the first word after the image is predicted from it.
        self.add_text([IMAGE_END])


def split_pieces(
    id: str, units: Sequence[list[int] | bytes], max_length: int, num_patches: Sequence[int]
) -> list[Piece]:
    """Cut a document into pieces of at most ``max_length`` positions, each starting with <bos>.

    Text may be cut anywhere; an image and its <image_end> stay together. ``max_length`` must hold
    <bos>, an image, <image_end> and one token more.

    Args:
        units: text ids and encoded images; the last is text that ends with <eos>.
        num_patches: of each image.
    """
    pieces, sizes = [Piece(id=id)], iter(num_patches)

    def next_piece() -> None:
        pieces.append(Piece(id=f"{id}#{len(pieces)}"))

    for index, unit in enumerate(units):
        if isinstance(unit, bytes):
            size = next(sizes)
            # At most what a fresh piece has room for: otherwise one with nothing but <bos> would be left behind.
            need = min(size + 1 + MIN_TEXT_AFTER_IMAGE, max_length - 1)
            if pieces[-1].length + need > max_length:
                next_piece()
            pieces[-1].add_image(unit, size)
            continue
        start = 0
        while start < len(unit):
            take = min(len(unit) - start, max_length - pieces[-1].length)
            if index == len(units) - 1 and 0 < take == len(unit) - start - 1:
                take -= 1  # <eos> never stands alone in a piece
            pieces[-1].add_text(unit[start : start + take])
            start += take
            if start < len(unit):
                next_piece()
    return [piece.seal() for piece in pieces]


def pieces_table(pieces: Sequence[Piece]) -> pa.Table:
    """Sealed pieces as columns of a shard."""
    return pa.Table.from_pydict(
        {name: [getattr(piece, name) for piece in pieces] for name in SCHEMA.names}, schema=SCHEMA
    )


class ShardWriter:
    """Writes the pieces of one split: ``shard-00000.arrow``, ... and ``lengths.npy``.

    Args:
        native: whether images have grids of their own, so that ``lengths.npy`` has to tell more.

    Attributes:
        fingerprint: of the pieces so far.
    """

    def __init__(self, folder: Path, shard_documents: int = SHARD_DOCUMENTS, native: bool = False):
        self.folder, self.shard_documents, self.native = folder, shard_documents, native
        folder.mkdir(parents=True)
        self.fingerprint = Fingerprint()
        self._tables: list[pa.Table] = []
        self._num_rows = self._num_bytes = self._num_images = 0
        self._shards: list[dict] = []
        # Squares of patches may not fit int32.
        self._lengths: list[np.ndarray] = [np.zeros((0, 4), np.int64) if native else np.zeros((0, 2), np.int32)]

    def add_table(self, table: pa.Table) -> None:
        """Append rows of a shard's columns; a full shard goes to disk."""
        images = table["images"].combine_chunks()
        sizes = np.asarray(pc.binary_length(images.flatten()), np.int64)
        # Of int32 tokens and images; the rest is small.
        num_bytes = 4 * np.asarray(pc.list_value_length(table["tokens"])) + _sums(images, sizes)
        layout = table["layout"].combine_chunks()
        spans = np.asarray(layout.flatten())
        patches = np.maximum(-spans, 0).astype(np.int64)
        columns = [np.maximum(spans, 0), patches, *((patches > 0, patches**2) if self.native else ())]
        lengths = np.stack([_sums(layout, column) for column in columns], axis=1)
        self._lengths.append(lengths.astype(self._lengths[0].dtype))
        self._num_images += len(sizes)
        for digest in table["digest"].to_pylist():
            # In the order of documents, whatever shard they end up in.
            self.fingerprint.add(digest)
        ends, start = np.cumsum(num_bytes), 0
        while start < len(table):
            before = ends[start - 1] if start else 0
            # + 1: the document that crosses the limit still goes in, so a shard is never empty, however large a
            # document is.
            fills = int(np.searchsorted(ends, before + SHARD_BYTES - self._num_bytes)) + 1
            stop = min(len(table), start + self.shard_documents - self._num_rows, fills)
            self._tables.append(table.slice(start, stop - start))
            self._num_rows += stop - start
            self._num_bytes += int(ends[stop - 1] - before)
            if self._num_rows >= self.shard_documents or self._num_bytes >= SHARD_BYTES:
                self._flush()
            start = stop

    def close(self) -> dict:
        """Write what is left; returns the split's entry of ``dataset.json``."""
        self._flush()
        lengths = np.concatenate(self._lengths)
        np.save(self.folder / "lengths.npy", lengths)
        text, patches = lengths[:, :2].sum(axis=0, dtype=np.int64).tolist()
        return {
            "lengths_sha256": lengths_digest(lengths),
            "num_documents": len(lengths),
            "num_text_tokens": text,
            "num_patches": patches,
            "num_images": self._num_images,
            "shards": self._shards,
        }

    def _flush(self) -> None:
        if not self._num_rows:
            return
        name = f"shard-{len(self._shards):05d}.arrow"
        path = self.folder / name
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            # One batch for each shard: a document is found by its number, without a search through batches.
            writer.write_table(pa.concat_tables(self._tables).combine_chunks())
        with path.open("rb") as file:
            # Read back from the file, so that it is the digest of what was stored.
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        self._shards.append({"file": name, "num_documents": self._num_rows, "num_bytes": size, "sha256": sha256})
        self._tables, self._num_rows, self._num_bytes = [], 0, 0


def _sums(lists: pa.ListArray, values: np.ndarray) -> np.ndarray:
    """int64 [num_lists]: the sum of the values of each list."""
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
    counts = np.asarray(pc.list_value_length(lists))
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    # Differences of running sums: also lists without values have a sum.
    return np.diff(ends[bounds])
