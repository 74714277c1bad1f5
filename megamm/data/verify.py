"""A full check of a prepared dataset: every byte against what was noted when it was written."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megamm.data.dataset_info import FILE, Fingerprint, read_dataset_info
from megamm.data.shards import ShardedDataset
from megamm.errors import InputError, ProblemsError


def verify(path: Path | str, report: Callable[[int], None] = lambda done: None) -> dict:
    """Read all shards of a prepared dataset and compare sizes, checksums, lengths, counts and fingerprints.

    Args:
        report: called with the number of documents checked so far.

    Returns:
        The content of ``dataset.json``.

    Raises:
        InputError: something is missing or not what was written; names each such file.
    """
    path = Path(path)
    info = read_dataset_info(path)
    problems: list[str] = []
    tokenizer = path / "tokenizer.json"
    if not tokenizer.is_file():
        problems.append(f"{tokenizer.name}: missing")
    elif hashlib.sha256(tokenizer.read_bytes()).hexdigest() != info["tokenizer_sha256"]:
        problems.append(f"{tokenizer.name}: is not the tokenizer that made the ids")
    done = 0
    for split in info["splits"]:
        dataset = ShardedDataset(path, split)
        try:
            _check_files(dataset, problems)
            # After the files, which are read whole: a damaged shard may end the reading of documents.
            done = _check_documents(dataset, problems, report, done)
        except InputError as error:
            # The list adds the folder and the advice itself.
            problems.append(str(error).removeprefix(f"{path}/").removesuffix("; prepare the dataset again"))
    if problems:
        # dict.fromkeys: the same damage may be found twice, in the file and in its documents.
        raise ProblemsError(f"{path}", [f"{problem}; prepare the dataset again" for problem in dict.fromkeys(problems)])
    return info


def _check_files(dataset: ShardedDataset, problems: list[str]) -> None:
    for shard in dataset.info["splits"][dataset.split]["shards"]:
        name = f"{dataset.split}/{shard['file']}"
        try:
            with (dataset.path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror})")
            continue
        if found != shard["sha256"]:
            problems.append(f"{name}: damaged, its checksum is not that in {FILE}")


def _check_documents(dataset: ShardedDataset, problems: list[str], report: Callable[[int], None], done: int) -> int:
    """Check each document against its own checksum, its length and the fingerprint of the split."""
    fingerprint, images = Fingerprint(), 0
    lengths, sizes = dataset.lengths, dataset.sizes()
    for index in range(len(dataset)):
        example = dataset[index]
        fingerprint.add(example.digest)
        images += len(example.images)
        patches = -example.layout[example.layout < 0].astype(np.int64)
        held = (len(example.tokens), int(patches.sum()), len(patches), int((patches**2).sum()))
        if held != tuple(int(column[index]) for column in sizes):
            problems.append(f"{dataset.split}/lengths.npy: damaged, it does not fit document {example.id!r}")
        report(done := done + 1)
    counts = dataset.info["splits"][dataset.split]
    text, patches = np.asarray(lengths).sum(axis=0, dtype=np.int64).tolist()
    for key, value in (("num_text_tokens", text), ("num_patches", patches), ("num_images", images)):
        if counts[key] != value:
            problems.append(f"{FILE}: splits.{dataset.split}.{key} is {counts[key]}, the shards hold {value}")
    if fingerprint.hex() != dataset.info["fingerprints"]["splits"][dataset.split]:
        problems.append(f"{FILE}: fingerprints.splits.{dataset.split} is not that of the documents")
    return done
