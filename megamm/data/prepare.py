"""Preparation: documents to token ids and resized images in Arrow shards.

Workers read, decode and tokenize the documents of one part after another (megamm.data.parts). When all parts are there,
the main process deals their documents to the splits and writes the shards, in the order of the inputs: the output does
not depend on the number of workers. All is built in a folder beside the target and put in its place at the end. A run
that dies leaves the target as it was, and the next one goes on with the parts that are whole.
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import numpy as np

from megamm import files
from megamm.data import images
from megamm.data.dataset_info import FILE, FORMAT_VERSION, make_info
from megamm.data.documents import Document, Skipped, Task, Text, unread
from megamm.data.near import image_bits, text_bands
from megamm.data.parts import Entry, PreparedParts, listing_digest, read_part, write_part
from megamm.data.readers import open_inputs
from megamm.data.shards import DIGEST_BYTES, document_digest
from megamm.data.splits import Documents
from megamm.data.tokenizer import Tokenizer
from megamm.data.workers import run_jobs
from megamm.data.writer import Piece, ShardWriter, split_pieces
from megamm.errors import InputError, RunError
from megamm.sequence import EOS, patches_per_image

# A folder that holds anything else is not ours to replace.
OUTPUTS = frozenset((FILE, "tokenizer.json", "skipped.jsonl", "train", "val"))

PARTS = "parts"
"""Folder of the parts, beside the shards that are made of them."""


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Everything that the output depends on, but for the content of the inputs.

    Attributes:
        inputs: paths and ``scenes:KIND``.
        kind: caption, interleaved, text, or auto.
        tokenizer: path of a ``tokenizer.json``.
        image_size, patch_size: pixels; the size is a multiple of the patch. No image has more patches than a square
            of that size.
        max_length: positions of a row, above which a document is cut into parts.
        fit: how an image becomes square: squash, crop or pad; native: it does not.
        val_fraction: share of tokens held out, in documents chosen by a hash of their content.
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
    fit: images.Fit = images.DEFAULT_FIT
    val_fraction: float = 0.02
    min_tokens: int = 1
    max_pixels: int = 50_000_000
    limit: int | None = None
    num_documents: int = 10_000
    seed: int = 0

    @property
    def num_patches(self) -> int:
        """Most patches of an image."""
        return patches_per_image(self.image_size, self.patch_size)

    def check(self) -> None:
        """Raise InputError with every problem, a line each."""
        found = []
        for name in ("image_size", "patch_size", "max_length", "max_pixels", "num_documents"):
            if getattr(self, name) < 1:
                found.append(f"--{name.replace('_', '-')}: {getattr(self, name)} is not positive")
        if not found and self.image_size % self.patch_size:
            found.append(f"--patch-size: {self.patch_size} does not divide --image-size {self.image_size}")
        # <bos>, an image, <image_end> and one token more; see split_pieces.
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


def prepare(
    settings: PrepareSettings,
    out: Path | str,
    workers: int = 1,
    report: Callable[[int, int | None, int], None] = lambda done, total, skipped: None,
    ray: bool = False,
) -> dict:
    """Write the prepared dataset ``out``, whole or not at all; an earlier one is replaced.

    Args:
        workers, ray: where documents are read (see :func:`megamm.data.workers.run_jobs`); the output is the same.
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
    # Checked again below: with the kind it is known whether rows must hold an image.
    settings = dataclasses.replace(settings, kind=kind)
    settings.check()
    try:
        with _replaced_folder(out) as folder:
            parts = PreparedParts(folder / PARTS, _identity(settings, tokenizer))

            def run(jobs: Iterable[tuple]) -> Iterator[Sequence[Entry]]:
                whole = ((parts.folder, settings, tokenizer.sha256, *job) for job in jobs)
                return run_jobs(_part, whole, workers=workers, ray=ray)

            counts = _write(
                parts.make(inputs.tasks, run),
                parts,
                inputs.pictures,
                folder,
                settings,
                lambda done, s: report(done, inputs.num_tasks, s),
            )
            shutil.copyfile(settings.tokenizer, folder / "tokenizer.json")
            # What is a field of its own in dataset.json is not said twice; the tokenizer's path means nothing
            # elsewhere.
            stored = dataclasses.asdict(settings)
            info = make_info(
                vocab_size=tokenizer.vocab_size,
                tokenizer_sha256=tokenizer.sha256,
                **{key: stored.pop(key) for key in ("kind", "image_size", "patch_size", "max_length")},
                fit=settings.fit,
                settings={key: value for key, value in stored.items() if key != "tokenizer"},
                **counts,
            )
            # The last file: a folder with a dataset.json has everything.
            files.write_json(folder / FILE, info)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise RunError(
                f"{out.parent}: no space left on the disk; free some and run again: it goes on where it was "
                f"({_partial(out).name} holds what is done)"
            ) from error
        raise
    return info


def _identity(settings: PrepareSettings, tokenizer: Tokenizer) -> dict:
    """All that the parts depend on."""
    return {
        "settings": dataclasses.asdict(settings) | {"tokenizer": tokenizer.sha256},
        "format_version": FORMAT_VERSION,
        "listing": listing_digest(settings.inputs),
    }


def encode_document(document: Document, settings: PrepareSettings, tokenizer: Tokenizer) -> tuple[list[Piece], Entry]:
    """Tokenize, resize and cut one document: its pieces, none if it was left out, and its entry.

    An image that cannot be used is skipped alone, or with its document where it is the document's point:
    in captions.
    """
    skipped: list[Skipped] = []

    def left_out(reason: str) -> tuple[list[Piece], Entry]:
        return [], Entry(skipped=(*skipped, Skipped(id=document.id, reason=reason)), files=document.files)

    units, text, num_patches, bits = [], "", [], []
    try:
        for span in document.spans:
            if isinstance(span, Text):
                # Text on both sides of a picture that is left out becomes one span.
                text += span.text
            elif settings.kind != "text":  # pages read as text lose their pictures
                try:
                    pixels = images.read_rgb(span.data, settings.max_pixels)
                except images.ImageError as error:
                    if settings.kind == "caption":
                        return left_out(str(error))
                    skipped.append(Skipped(id=f"{document.id}: {span.name}", reason=str(error)))
                    continue
                # A whole span at a time: a token may reach across the spans of a reader, but not across a picture.
                units += [tokenizer.encode(text).tolist()]
                if settings.kind == "caption":
                    bits.append(image_bits(pixels))
                pixels = images.resize(pixels, settings.image_size, settings.fit, settings.patch_size)
                num_patches.append(pixels.shape[0] * pixels.shape[1] // settings.patch_size**2)
                units += [images.encode(pixels)]
                text = ""
        units.append([*tokenizer.encode(text).tolist(), EOS])
    except UnicodeEncodeError:
        return left_out("wrong encoding: text is not UTF-8")
    num_tokens = sum(len(unit) for unit in units if isinstance(unit, list)) - 1  # without <eos>
    if num_tokens < settings.min_tokens:
        return left_out("too little text" if num_tokens else "no text")
    pieces = split_pieces(document.id, units, settings.max_length, num_patches)
    texts = [unit for unit in units if isinstance(unit, list)]
    ids = [token for text in texts for token in text]
    pictures = [unit for unit in units if isinstance(unit, bytes)]
    return pieces, Entry(
        skipped=tuple(skipped),
        files=document.files,
        # Without the id, which differs between copies; with all of the content before it is cut into pieces.
        digest=document_digest("", ids, [len(text) for text in texts], pictures).hex(),
        image_digests=tuple(hashlib.sha256(picture).digest()[:DIGEST_BYTES].hex() for picture in pictures),
        # As with equal ones: a caption pair is known by its picture, another document by its text.
        text_bands=() if settings.kind == "caption" else tuple(text_bands(np.array(ids)).tolist()),
        image_bits=tuple(bits),
        num_pieces=len(pieces),
        num_tokens=sum(piece.length for piece in pieces),
        num_images=len(pictures),
    )


class _Skipped:
    """Writes ``skipped.jsonl`` and counts by reason."""

    def __init__(self, file: TextIO):
        self.file = file
        self.reasons: Counter[str] = Counter()
        self.first = ""

    def add(self, entry: Skipped) -> None:
        self.first = self.first or f"; first {entry.id}: {entry.reason}"
        self.file.write(json.dumps(dataclasses.asdict(entry)) + "\n")
        # What follows a colon is of one input alone, and would make every reason another one.
        self.reasons[entry.reason.split(":")[0]] += 1


def _write(
    entries: Iterator[Entry],
    parts: PreparedParts,
    pictures: dict[str, str],
    folder: Path,
    settings: PrepareSettings,
    report: Callable[[int, int], None],
) -> dict:
    """Write shards and skipped.jsonl; returns the counts for dataset.json.

    Documents can be dealt to the splits only when the tokens of all are known.
    """
    # Pictures that no document refers to are only known once all documents have been read.
    documents, unseen = Documents(), dict(pictures)
    with (folder / "skipped.jsonl").open("w", encoding="utf-8") as file:
        skipped = _Skipped(file)
        for done, entry in enumerate(entries, start=1):
            for one in entry.skipped:
                skipped.add(one)
            for path in entry.files:
                unseen.pop(path, None)
            if entry.num_pieces:
                documents.add(
                    bytes.fromhex(entry.digest),
                    # In pages the same picture is often a logo: only a caption pair is known by its picture.
                    [bytes.fromhex(one) for one in entry.image_digests] if settings.kind == "caption" else [],
                    entry.num_tokens,
                    entry.num_images,
                    entry.num_pieces,
                    entry.text_bands,
                    entry.image_bits,
                )
            report(done, skipped.reasons.total())
            if len(documents) == settings.limit:
                break
        # Not after a limit: what lies behind it was not looked at.
        else:
            for name in unseen.values():
                skipped.add(Skipped(id=name, reason="image that nothing refers to"))
    if not len(documents):
        listed = "; ".join(f"{count} x {reason}" for reason, count in skipped.reasons.most_common(5))
        raise InputError(f"{' '.join(settings.inputs)}: no document is left ({listed or 'empty input'}{skipped.first})")
    splits, fingerprints = _deal(folder, parts, documents, settings)
    return {
        "splits": splits,
        "fingerprints": fingerprints,
        "num_repeats": documents.num_repeats(),
        "num_near_repeats": documents.num_near_repeats(),
        "skipped_by_reason": skipped.reasons,
    }


def _deal(folder: Path, parts: PreparedParts, documents: Documents, settings: PrepareSettings) -> tuple[dict, dict]:
    """Copy the pieces to the folders of their splits; returns entries and fingerprints of these."""
    # Whole documents: pieces of one must not be on both sides.
    in_val = np.repeat(documents.hold_out(settings.val_fraction), documents.num_pieces)
    # No val folder where nothing is held out.
    names, native = ("train", "val") if in_val.any() else ("train",), settings.fit == "native"
    writers = {split: ShardWriter(folder / split, native=native) for split in names}
    start = 0
    for table in parts.tables():
        of_val = in_val[start : start + len(table)]
        for split, writer in writers.items():
            # Pieces behind a limit are of no split.
            writer.add_table(table.slice(0, len(of_val)).filter(of_val if split == "val" else ~of_val))
        start += len(table)
    # Only now: a run that is killed while it deals finds them again.
    shutil.rmtree(parts.folder)
    return {split: w.close() for split, w in writers.items()}, {s: w.fingerprint.hex() for s, w in writers.items()}


def _part(
    folder: Path, settings: PrepareSettings, tokenizer_sha256: str, number: int, tasks: list[Task] | None
) -> list[Entry]:
    """Make part ``number`` of these tasks, in any process, or read the one that is there; returns its entries."""
    if tasks is None:
        return read_part(folder, number)
    return write_part(folder, number, _encode(tasks, settings, _tokenizer(settings.tokenizer, tokenizer_sha256)))


@lru_cache(maxsize=1)
def _tokenizer(path: str, sha256: str) -> Tokenizer:
    """Once per process and content: it is slow to load and cannot come with every part."""
    return Tokenizer(path)


def _encode(
    tasks: Iterable[Task], settings: PrepareSettings, tokenizer: Tokenizer
) -> Iterator[tuple[list[Piece], Entry]]:
    for task in tasks:
        for item in task():
            if isinstance(item, Skipped):
                yield [], Entry(skipped=(item,))
                continue
            try:
                yield encode_document(item, settings, tokenizer)
            except Exception as error:  # one bad document never ends the run
                yield [], Entry(skipped=(unread(item.id, error),))


def _check_target(out: Path, settings: PrepareSettings) -> None:
    """Refuse to replace anything but a prepared dataset that is no input of this run."""
    for name in (*settings.inputs, settings.tokenizer):
        if Path(name).exists() and Path(name).resolve().is_relative_to(out.resolve()):
            raise InputError(f"--out {out}: holds the input {name}; give another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        names = {path.name for path in out.iterdir()}
        if FILE not in names or not names <= OUTPUTS:  # also one of an older version, or damaged, may be replaced
            raise InputError(f"--out {out}: is not empty and not a prepared dataset; give another folder")


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


@contextmanager
def _replaced_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` that takes its place if the block succeeds.

    It is locked. A killed or failed run leaves it with its parts; those are all that the next one finds in it. Bad
    input leaves nothing.
    """
    partial, old = _partial(out), out.with_name(f".{out.name}.old")
    partial.mkdir(parents=True, exist_ok=True)
    # The folder itself is locked: no further file is left behind, and the system lets go when the process dies.
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out {out}: another run is writing it") from error
        for path in partial.iterdir():  # only now, with the lock
            if path.name != PARTS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield partial
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                # A folder cannot be replaced by another in one step: for a moment there is none, and then the new one.
                os.replace(out, old)
            os.replace(partial, out)
        except InputError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(lock)
