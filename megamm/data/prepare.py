"""Preparation: documents to token ids and resized images in Arrow shards.

Reading, decoding and tokenizing run in worker processes, a batch of tasks at a time; the main process writes
the results in the order of the tasks, so that the output does not depend on the number of workers. All is
built in a folder beside the target and put in its place at the end: a run that dies leaves the target as it
was, and the next run removes what it left.
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2

from megamm import files
from megamm.data import images
from megamm.data.documents import Document, Skipped, Text
from megamm.data.readers import Task, open_inputs
from megamm.data.shards import FORMAT_VERSION, read_dataset_info
from megamm.data.tokenizer import Tokenizer
from megamm.data.tokens import EOS
from megamm.data.writer import ShardRow, ShardWriter, split_rows
from megamm.errors import InputError, RunError

BATCH = 16
"""Reading tasks sent to a worker at a time."""


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Everything that the output depends on, but for the content of the inputs.

    Attributes:
        inputs: paths and ``scenes:KIND``.
        kind: caption, interleaved, text, or auto.
        tokenizer: path of a ``tokenizer.json``.
        image_size, patch_size: pixels; the size is a multiple of the patch.
        max_length: positions of a row, above which a document is cut into parts.
        fit: how an image becomes square: squash, crop or pad.
        val_fraction: share of documents held out, chosen by a hash of the id.
        min_tokens: documents of fewer text tokens are left out.
        max_pixels: larger images are refused, before decoding.
        limit: stop after this many documents.
        num_documents, seed: of ``scenes:`` inputs.
    """

    inputs: tuple[str, ...]
    kind: str = "auto"
    tokenizer: str
    image_size: int = 224
    patch_size: int = 14
    max_length: int = 1024
    fit: images.Fit = "squash"
    val_fraction: float = 0.02
    min_tokens: int = 1
    max_pixels: int = 50_000_000
    limit: int | None = None
    num_documents: int = 10_000
    seed: int = 0

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    def check(self) -> None:
        """Raise InputError with every problem, a line each."""
        found = []
        for name in ("image_size", "patch_size", "max_length", "max_pixels", "num_documents"):
            if getattr(self, name) < 1:
                found.append(f"--{name.replace('_', '-')}: {getattr(self, name)} is not positive")
        if not found and self.image_size % self.patch_size:
            found.append(f"--patch-size: {self.patch_size} does not divide --image-size {self.image_size}")
        shortest = 8 if self.kind == "text" else max(8, self.num_patches + 3) if not found else 0
        if not found and self.max_length < shortest:
            found.append(
                f"--max-length: {self.max_length} is too short; an image of {self.num_patches} patches with its "
                f"marks needs {shortest}"
            )
        if not 0 <= self.val_fraction <= 0.5:
            found.append(f"--val-fraction: {self.val_fraction} is not in [0, 0.5]")
        if self.limit is not None and self.limit < 1:
            found.append(f"--limit: {self.limit} is not positive")
        if found:
            raise InputError("\n".join(found))


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a worker makes of one document: its rows (none if it was left out), and what was skipped."""

    id: str
    rows: list[ShardRow]
    skipped: list[Skipped]


def prepare(
    settings: PrepareSettings,
    out: Path | str,
    workers: int = 1,
    report: Callable[[int, int | None, int], None] = lambda done, total, skipped: None,
) -> dict:
    """Write the prepared dataset ``out``, whole or not at all; an earlier one is replaced.

    Args:
        workers: processes; the output is the same for any number.
        report: called with tasks done, tasks in all (None if unknown) and inputs skipped so far.

    Returns:
        The content of ``dataset.json``.

    Raises:
        InputError: bad settings, inputs of different kinds, nothing to write, ``out`` is another folder.
        RunError: the disk is full, or a worker was killed.
    """
    settings.check()
    out = Path(out)
    tokenizer = Tokenizer(settings.tokenizer)
    inputs = open_inputs(
        list(settings.inputs),
        settings.kind,
        num_documents=settings.num_documents,
        seed=settings.seed,
        image_size=settings.image_size,
    )
    if len(set(inputs.kinds)) > 1:
        listed = "; ".join(f"{name} is {kind}" for name, kind in zip(settings.inputs, inputs.kinds, strict=True))
        raise InputError(f"inputs of different kinds ({listed}): prepare each into its own folder, or give --kind")
    _check_target(out, settings)
    kind = inputs.kinds[0]
    settings = dataclasses.replace(settings, kind=kind)
    settings.check()
    try:
        with _replaced_folder(out) as folder:
            documents = _encode_all(inputs.tasks, settings, tokenizer, workers)
            counts = _write(documents, folder, settings, lambda d, s: report(d, inputs.num_tasks, s))
            shutil.copyfile(settings.tokenizer, folder / "tokenizer.json")
            stored = dataclasses.asdict(settings)
            info = {
                "format_version": FORMAT_VERSION,
                "name": out.resolve().name,
                "kind": kind,
                "vocab_size": tokenizer.vocab_size,
                "tokenizer_sha256": tokenizer.sha256,
                **{key: stored.pop(key) for key in ("image_size", "patch_size", "max_length")},
                "settings": {key: value for key, value in stored.items() if key not in ("kind", "tokenizer")},
                **counts,
            }
            files.write_json(folder / "dataset.json", info)
    except BrokenProcessPool as error:
        raise RunError("a worker was killed (out of memory?); try fewer --workers") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise RunError(f"{out.parent}: no space left on the disk; free some and run again") from error
        raise
    return info


def encode_document(document: Document, settings: PrepareSettings, tokenizer: Tokenizer) -> Encoded:
    """Tokenize, resize and cut one document.

    An image that cannot be used is skipped alone, or with its document where it is the document's point:
    in captions.
    """
    skipped: list[Skipped] = []

    def left_out(reason: str) -> Encoded:
        return Encoded(id=document.id, rows=[], skipped=[*skipped, Skipped(id=document.id, reason=reason)])

    units, text = [], ""
    try:
        for span in document.spans:
            if isinstance(span, Text):
                text += span.text
            elif settings.kind != "text":
                try:
                    pixels = images.read_rgb(span.data, settings.max_pixels)
                except images.ImageError as error:
                    if settings.kind == "caption":
                        return left_out(str(error))
                    skipped.append(Skipped(id=f"{document.id}: {span.name}", reason=str(error)))
                    continue
                units += [tokenizer.encode(text).tolist()]
                units += [images.encode(images.resize(pixels, settings.image_size, settings.fit))]
                text = ""
        units.append([*tokenizer.encode(text).tolist(), EOS])
    except UnicodeEncodeError:
        return left_out("wrong encoding: text is not UTF-8")
    num_tokens = sum(len(unit) for unit in units if isinstance(unit, list)) - 1
    if num_tokens < settings.min_tokens:
        return left_out("too little text" if num_tokens else "no text")
    rows = split_rows(document.id, units, settings.max_length, settings.num_patches)
    return Encoded(id=document.id, rows=rows, skipped=skipped)


def assign_splits(documents: Iterable[Encoded], val_fraction: float) -> Iterator[tuple[str, Encoded]]:
    """Give each document its split, by a hash of its id, so that it stays there whatever else is prepared.

    Of two or more documents at least one goes to each split: while only one split has been seen, the
    document nearest to the other is held back. With ``val_fraction`` 0 there is no val.
    """
    held, passed, both = None, 0, val_fraction == 0
    for document in documents:
        split = _natural_split(document, val_fraction)
        if both:
            yield split, document
        elif held is None:
            held = document
        elif _natural_split(held, val_fraction) != split:
            yield _natural_split(held, val_fraction), held
            yield split, document
            held, both = None, True
        else:
            swap = (_hash(document) < _hash(held)) == (split == "train")
            yield split, held if swap else document
            held = document if swap else held
            passed += 1
    if held is not None:
        opposite = "val" if _natural_split(held, val_fraction) == "train" else "train"
        yield opposite if passed else "train", held


def _hash(document: Encoded) -> float:
    digest = hashlib.blake2b(document.id.encode("utf-8", errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _natural_split(document: Encoded, val_fraction: float) -> str:
    return "val" if _hash(document) < val_fraction else "train"


def _write(
    documents: Iterator[Encoded], folder: Path, settings: PrepareSettings, report: Callable[[int, int], None]
) -> dict:
    """Write shards and skipped.jsonl; returns the counts for dataset.json."""
    writers = {split: ShardWriter(folder / split) for split in ("train", "val")}
    reasons: Counter[str] = Counter()
    done = 0

    with (folder / "skipped.jsonl").open("w", encoding="utf-8") as log:

        def kept() -> Iterator[Encoded]:
            nonlocal done
            for document in documents:
                for entry in document.skipped:
                    log.write(json.dumps(dataclasses.asdict(entry)) + "\n")
                    reasons[entry.reason.split(":")[0]] += 1
                done += 1
                report(done, reasons.total())
                if document.rows:
                    yield document

        for split, document in assign_splits(islice(kept(), settings.limit), settings.val_fraction):
            writers[split].add(document.rows)
    splits = {split: writer.close() for split, writer in writers.items()}
    if not splits["train"]["num_documents"]:
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
        raise InputError(f"{' '.join(settings.inputs)}: no document is left ({listed or 'empty input'})")
    if not splits["val"]["num_documents"]:
        del splits["val"]
        shutil.rmtree(folder / "val", ignore_errors=True)
    return {"splits": splits, "num_skipped": reasons.total(), "skipped_by_reason": dict(sorted(reasons.items()))}


def _encode_all(
    tasks: Iterator[Task], settings: PrepareSettings, tokenizer: Tokenizer, workers: int
) -> Iterator[Encoded]:
    """Run the tasks in ``workers`` processes; results in the order of the tasks."""
    batches = iter(lambda: list(islice(tasks, BATCH)), [])
    if workers <= 1:
        for batch in batches:
            yield from _encode_batch(batch, settings, tokenizer)
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe once the tokenizer's threads exist
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(settings,))
    try:
        pending = deque(pool.submit(_work, batch) for batch in islice(batches, 4 * workers))
        while pending:
            yield from pending.popleft().result()
            pending.extend(pool.submit(_work, batch) for batch in islice(batches, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_batch(batch: list[Task], settings: PrepareSettings, tokenizer: Tokenizer) -> list[Encoded]:
    encoded = []
    for task in batch:
        try:
            for item in task():
                if isinstance(item, Skipped):
                    encoded.append(Encoded(id=item.id, rows=[], skipped=[item]))
                else:
                    encoded.append(encode_document(item, settings, tokenizer))
        except OSError as error:
            entry = Skipped(id=str(error.filename), reason=f"cannot be read: {error.strerror}")
            encoded.append(Encoded(id=entry.id, rows=[], skipped=[entry]))
    return encoded


_worker: dict = {}


def _start_worker(settings: PrepareSettings) -> None:
    cv2.setNumThreads(1)  # the workers are the parallelism
    _worker.update(settings=settings, tokenizer=Tokenizer(settings.tokenizer))


def _work(batch: list[Task]) -> list[Encoded]:
    return _encode_batch(batch, **_worker)


def _check_target(out: Path, settings: PrepareSettings) -> None:
    """Refuse to replace anything but a prepared dataset that is no input of this run."""
    for name in (*settings.inputs, settings.tokenizer):
        if Path(name).exists() and Path(name).resolve().is_relative_to(out.resolve()):
            raise InputError(f"--out {out}: holds the input {name}; give another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        try:
            read_dataset_info(out)
        except InputError as error:
            raise InputError(f"--out {out}: is not empty and not a prepared dataset; give another folder") from error


@contextmanager
def _replaced_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` that takes its place if the block succeeds.

    It is locked, and what a killed run left in it is removed.
    """
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out {out}: another run is writing it") from error
        try:
            for path in partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield partial
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                os.replace(out, old)
            os.replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(lock)
