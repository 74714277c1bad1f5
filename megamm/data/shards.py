"""Prepared data on disk: Arrow IPC shards, a length index and ``dataset.json``.

A prepared dataset is a folder::

    dataset.json                      counts, settings, fingerprints, shard list (see megamm.data.dataset_info)
    tokenizer.json                    the tokenizer that made the ids
    skipped.jsonl                     inputs left out, each with its reason
    train/shard-00000.arrow ...       documents
    train/lengths.npy                 int32 [num_documents, 2]: text tokens, image patches; of native images
                                      int64 [num_documents, 4]: also images, and pairs of patches of one image
    val/...

A document row of a shard holds ``id`` (string), ``tokens`` (int32 ids of all text spans, end to end, with
<bos>, <eos> and <image_end>), ``layout`` (int32: ``n > 0`` stands for the next n text tokens, ``-n`` for
the next image, of n patches), ``images`` (encoded bytes, one per image, at training resolution: its size over that of
a patch is the image's grid) and ``digest``
(:func:`document_digest` of the others, checked when a document is read).
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from megamm.data.dataset_info import is_native, read_dataset_info
from megamm.errors import InputError
from megamm.sequence import patches_per_image

DIGEST_BYTES = 16

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("layout", pa.list_(pa.int32())),
        ("images", pa.list_(pa.large_binary())),  # 64-bit offsets: no limit of 2 GiB
        ("digest", pa.binary(DIGEST_BYTES)),
    ]
)


def document_digest(id: str, tokens: Sequence[int], layout: Sequence[int], images: Sequence[bytes]) -> bytes:
    """Digest of all that a document holds: the first 16 bytes of SHA-256, with lengths that keep the parts apart.

    It takes about a twentieth of the time of decoding the images.
    """
    parts = [id.encode("utf-8"), *(np.asarray(part, "<i4").tobytes() for part in (tokens, layout)), *images]
    # Lengths first: otherwise bytes could move from one part to the next unseen.
    digest = hashlib.sha256(np.array([len(part) for part in parts], "<i8").tobytes())
    for part in parts:
        digest.update(part)
    return digest.digest()[:DIGEST_BYTES]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prepared document.

    Attributes:
        id: where it came from.
        tokens: int32 [num_text_tokens].
        layout: int32 [num_spans]; ``n > 0`` text tokens, ``-n`` patches of the next image.
        images: encoded images (PNG or JPEG bytes), in order.
        digest: of the others.
    """

    id: str
    tokens: np.ndarray
    layout: np.ndarray
    images: list[bytes]
    digest: bytes = b""


class DocumentSizes(NamedTuple):
    """What documents hold, each int64 [num_documents].

    Attributes:
        text: text tokens.
        patches: image patches.
        images: images.
        image_pairs: pairs of patches of one image, n^2 for an image of n.
    """

    text: np.ndarray
    patches: np.ndarray
    images: np.ndarray
    image_pairs: np.ndarray


def lengths_digest(lengths: np.ndarray) -> str:
    """SHA-256 in hex of the content of ``lengths.npy``."""
    return hashlib.sha256(np.ascontiguousarray(lengths).view(np.uint8).data).hexdigest()


class ShardedDataset:
    """Random access to one split of a prepared dataset; shards are memory-mapped on first use.

    Cheap to pickle (worker processes open their own maps).

    Raises:
        InputError: the folder, its ``dataset.json``, the split or a shard is missing or damaged.
    """

    def __init__(self, path: Path | str, split: str):
        self.path, self.split = Path(path), split
        self.info = read_dataset_info(self.path)
        if split not in self.info["splits"]:
            raise InputError(f"{self.path}: no split {split!r}; it has {', '.join(self.info['splits'])}")
        self._shards = self.info["splits"][split]["shards"]
        self._ends = np.cumsum([shard["num_documents"] for shard in self._shards])
        self._tables: dict[int, pa.Table] = {}
        self._files: dict[int, BinaryIO] = {}

    def __getstate__(self):
        # Maps and open files stay here: whoever unpickles opens it anew.
        return {"path": self.path, "split": self.split}

    def __setstate__(self, state):
        ShardedDataset.__init__(self, **state)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @cached_property
    def lengths(self) -> np.ndarray:
        """Integers [num_documents, 2], memory-mapped: text tokens and image patches of each document."""
        return self._lengths[:, :2]

    def sizes(self, documents: np.ndarray | slice = slice(None)) -> DocumentSizes:
        """What documents hold, by their numbers; all by default."""
        columns = np.asarray(self._lengths[documents], np.int64).T
        if is_native(self.info):
            return DocumentSizes(*columns)
        text, patches = columns
        per_image = patches_per_image(self.info["image_size"], self.info["patch_size"])
        return DocumentSizes(text, patches, patches // per_image, patches * per_image)

    @cached_property
    def _lengths(self) -> np.ndarray:
        path = self.path / self.split / "lengths.npy"
        try:
            lengths = np.load(path, mmap_mode="r", allow_pickle=False)  # data may come from anybody
        except (OSError, EOFError, ValueError, SyntaxError) as error:  # what numpy makes of a damaged header
            raise InputError(f"{path}: cannot be read ({error}); prepare the dataset again") from error
        if lengths.shape != (len(self), 4 if is_native(self.info) else 2):
            raise InputError(
                f"{path}: has {lengths.shape[0]} rows, dataset.json counts {len(self)} documents; "
                "prepare the dataset again"
            )
        # Every row of every plan depends on it.
        if lengths_digest(lengths) != self.info["splits"][self.split]["lengths_sha256"]:
            raise InputError(f"{path}: damaged, its checksum is not that of dataset.json; prepare the dataset again")
        return lengths

    def check_shards(self) -> None:
        """Raise InputError if a shard is missing or has not the size that it was written with."""
        for shard in range(len(self._shards)):
            try:
                self._check_size(shard, self._path(shard).stat().st_size)
            except OSError as error:
                raise InputError(f"{self._path(shard)}: {error.strerror}; prepare the dataset again") from error

    def _path(self, shard: int) -> Path:
        return self.path / self.split / self._shards[shard]["file"]

    def _check_size(self, shard: int, num_bytes: int) -> None:
        expected = self._shards[shard]["num_bytes"]
        if num_bytes != expected:
            raise InputError(
                f"{self._path(shard)}: damaged or cut short, it has {num_bytes} bytes instead of {expected}; "
                "prepare the dataset again"
            )

    def _table(self, shard: int) -> pa.Table:
        path = self._path(shard)
        if shard not in self._tables:
            try:
                # Kept open: its size is that of the file that is mapped, also after another one has taken its name.
                file = path.open("rb")
                self._check_size(shard, os.fstat(file.fileno()).st_size)
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
                # Arrow trusts offsets: damaged ones would read outside of the map, and end the process.
                table.validate(full=True)  # reads offsets and ids, not what they point at
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{path}: damaged or cut short ({error}); prepare the dataset again") from error
            if table.schema != SCHEMA:
                raise InputError(f"{path}: has other columns than a shard; prepare the dataset again")
            if table.num_rows != self._shards[shard]["num_documents"]:
                raise InputError(
                    f"{path}: holds {table.num_rows} documents, dataset.json says "
                    f"{self._shards[shard]['num_documents']}; prepare the dataset again"
                )
            self._tables[shard] = table
            self._files[shard] = file
        # A file that is cut while it is mapped would end the process without a word (SIGBUS).
        self._check_size(shard, os.fstat(self._files[shard].fileno()).st_size)
        return self._tables[shard]

    def __getitem__(self, index: int) -> Example:
        """Document ``index``.

        Raises:
            InputError: its shard is damaged, or the document is not what was written.
        """
        shard = int(np.searchsorted(self._ends, index, side="right"))
        table = self._table(shard)
        row = int(index - (self._ends[shard - 1] if shard else 0))
        parts = {
            "id": table["id"][row].as_py(),
            "tokens": table["tokens"][row].values.to_numpy(),  # a view of the map: nothing is copied
            "layout": table["layout"][row].values.to_numpy(),
            "images": table["images"][row].as_py(),
        }
        digest = document_digest(**parts)
        # At each read, and not once for the shard: that would read all of it before the first document.
        if digest != table["digest"][row].as_py():
            raise InputError(
                f"{self._path(shard)}: document {parts['id']!r} is damaged, its checksum is wrong; prepare the dataset "
                "again"
            )
        return Example(**parts, digest=digest)


def fingerprints(path: Path | str) -> dict[str, str]:
    """What tells the content of a prepared dataset from any other: hex digests of ``tokenizer``, ``preprocessing``
    (of images) and of each split by its name."""
    found = read_dataset_info(path)["fingerprints"]
    return {"tokenizer": found["tokenizer"], "preprocessing": found["preprocessing"], **found["splits"]}
