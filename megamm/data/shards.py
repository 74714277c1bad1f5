"""Prepared data on disk: Arrow IPC shards, a length index and ``dataset.json``.

A prepared dataset is a folder::

    dataset.json                      counts, settings, tokenizer hash, shard list
    tokenizer.json                    the tokenizer that made the ids
    skipped.jsonl                     inputs left out, each with its reason
    train/shard-00000.arrow ...       documents
    train/lengths.npy                 int32 [num_documents, 2]: text tokens, image patches
    val/...

A document row of a shard holds ``id`` (string), ``tokens`` (int32 ids of all text spans, end to end, with
<bos>, <eos> and <image_end>), ``layout`` (int32: ``n > 0`` stands for the next n text tokens, ``-n`` for
the next image, of n patches) and ``images`` (encoded bytes, one per image, at training resolution).
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from megamm.errors import InputError

FORMAT_VERSION = 1

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("layout", pa.list_(pa.int32())),
        ("images", pa.list_(pa.large_binary())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prepared document.

    Attributes:
        id: where it came from.
        tokens: int32 [num_text_tokens].
        layout: int32 [num_spans]; ``n > 0`` text tokens, ``-n`` patches of the next image.
        images: encoded images (PNG or JPEG bytes), in order.
    """

    id: str
    tokens: np.ndarray
    layout: np.ndarray
    images: list[bytes]


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

    def __getstate__(self):
        return {"path": self.path, "split": self.split}

    def __setstate__(self, state):
        self.__init__(**state)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [num_documents, 2], memory-mapped: text tokens and image patches of each document."""
        path = self.path / self.split / "lengths.npy"
        try:
            lengths = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); prepare the dataset again") from error
        if lengths.shape != (len(self), 2):
            raise InputError(
                f"{path}: has {lengths.shape[0]} rows, dataset.json counts {len(self)} documents; "
                "prepare the dataset again"
            )
        return lengths

    def _table(self, shard: int) -> pa.Table:
        if shard not in self._tables:
            path = self.path / self.split / self._shards[shard]["file"]
            try:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            except (OSError, pa.ArrowInvalid) as error:
                raise InputError(f"{path}: damaged or cut short ({error}); prepare the dataset again") from error
            if table.num_rows != self._shards[shard]["num_documents"]:
                raise InputError(
                    f"{path}: holds {table.num_rows} documents, dataset.json says "
                    f"{self._shards[shard]['num_documents']}; prepare the dataset again"
                )
            self._tables[shard] = table
        return self._tables[shard]

    def __getitem__(self, index: int) -> Example:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        table = self._table(shard)
        row = int(index - (self._ends[shard - 1] if shard else 0))
        return Example(
            id=table["id"][row].as_py(),
            tokens=table["tokens"][row].values.to_numpy(),
            layout=table["layout"][row].values.to_numpy(),
            images=table["images"][row].as_py(),
        )


def read_dataset_info(path: Path | str) -> dict:
    """Read and check ``dataset.json`` of a prepared dataset.

    Keys: ``format_version, name, kind, vocab_size, tokenizer_sha256, image_size, patch_size, max_length,
    settings, splits: {split: {num_documents, num_text_tokens, num_patches, num_images, shards:
    [{file, num_documents}]}}, num_skipped``.
    """
    file = Path(path) / "dataset.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: not found; make it with tools/prepare_data.py --out {path}") from error
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); prepare the dataset again") from error
    if info.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version is {info.get('format_version')!r}, this version reads {FORMAT_VERSION}; "
            "prepare the dataset again"
        )
    return info
