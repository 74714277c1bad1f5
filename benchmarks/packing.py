"""Padding and speed of the packed loader: ours beside greedy packing and best-fit-decreasing, on the same documents.

    python benchmarks/packing.py [--data DIR ...] [--rows 1024 4096] [--window-tokens 1000000] [--far 1000000]

Without ``--data``: lengths drawn like a 45-45-10 mixture of captions, interleaved pages and text, with images of
256 patches (224 pixels, patch 14) or 64, and a loader that reads 224-pixel JPEG captions with one worker process.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from megamm_laws.arguments import ArgumentParser
from rich.console import Console
from rich.table import Table

from megamm.config import DataConfig, SourceConfig
from megamm.data import images
from megamm.data.dataset_info import make_info
from megamm.data.loader import Loader, build_pack_plan, open_sources
from megamm.data.pack_plan import PackPlan
from megamm.data.packing import best_fit_decreasing, num_rows, pack_documents, padding_share
from megamm.data.shards import ShardedDataset, lengths_digest
from megamm.data.writer import SHARD_DOCUMENTS, ShardWriter, pieces_table, split_pieces
from megamm.errors import exit_on_error
from megamm.sequence import EOS, patches_per_image

SHARES = {"caption": 0.45, "interleaved": 0.45, "text": 0.10}


def greedy(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """The row of each document when they are put down in the order they come."""
    rows, row, filled = [], 0, 0
    for length in lengths.tolist():
        if filled + length > row_length:
            row, filled = row + 1, 0
        filled += length
        rows.append(row)
    return np.array(rows)


def draw_lengths(kind: str, num_tokens: int, row_length: int, patches: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of about ``num_tokens`` tokens of prepared documents, none longer than a row."""
    lengths, total = [], 0
    while total < num_tokens:
        if kind == "caption":
            pieces = [patches + 3 + rng.integers(20, 61)]
        elif kind == "text":
            n = int(rng.lognormal(5.8, 1)) + 10
            pieces = [row_length] * (n // row_length) + [n % row_length]
        else:  # sections of an image and a paragraph; a page longer than a row is cut, though never in an image
            pieces = [2]
            for _ in range(rng.geometric(0.25)):
                text = 1 + int(min(600, rng.lognormal(4.3, 0.8)))
                if pieces[-1] + patches + 1 > row_length:
                    pieces.append(0)
                pieces[-1] += patches + 1
                fitting = min(text, row_length - pieces[-1])
                pieces[-1] += fitting
                if text > fitting:
                    pieces.append(text - fitting)
        lengths += [n for n in pieces if n]
        total += sum(pieces)
    return np.array(lengths)


def mixture(num_tokens: int, row_length: int, patches: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    parts = [draw_lengths(k, int(num_tokens * share), row_length, patches, rng) for k, share in SHARES.items()]
    return rng.permutation(np.concatenate(parts))


def prepared(paths: list[str], num_tokens: int) -> np.ndarray:
    """Lengths of the documents of prepared datasets in equal shares, repeated to ``num_tokens``."""
    rng = np.random.default_rng(0)
    parts = []
    for path in paths:
        lengths = ShardedDataset(path, "train").lengths.sum(1)
        count = max(1, int(num_tokens / len(paths) / lengths.mean()))
        parts.append(np.concatenate([rng.permutation(lengths) for _ in range(-(-count // len(lengths)))])[:count])
    return rng.permutation(np.concatenate(parts))


def padding_table(args: argparse.Namespace) -> Table:
    table = Table(title=f"padding, % of positions, and packing time, ms; windows of {args.window_tokens:,} tokens")
    for column in ("documents", "row", "number", "greedy", "best-fit-decreasing", "ours", "one row is"):
        table.add_column(column, justify="right")
    for row_length in args.rows:
        cases = {f"{p} patches": mixture(args.window_tokens, row_length, p) for p in (256, 64)}
        if args.data:
            cases = {"prepared data": prepared(args.data, args.window_tokens)}
        for name, lengths in cases.items():
            cells = []
            for pack in (greedy, best_fit_decreasing, pack_documents):
                began = time.perf_counter()
                rows = num_rows(pack(lengths, row_length))
                milliseconds = 1000 * (time.perf_counter() - began)
                cells.append(f"{100 * padding_share(lengths, rows, row_length):.2f}  ({milliseconds:.0f})")
            table.add_row(name, str(row_length), str(len(lengths)), *cells, f"{100 / rows:.2f}")
    return table


def make_captions(path: Path, num_documents: int) -> None:
    """A prepared dataset of 224-pixel JPEG images with captions of 20 to 60 tokens."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(path / "train", num_documents)
    for i in range(num_documents):
        coarse = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        words = rng.integers(5, 1000, rng.integers(20, 61)).tolist()
        units = [[], images.encode(images.resize(coarse, 224)), [*words, EOS]]
        writer.add_table(pieces_table(split_pieces(str(i), units, 1024, [256])))
    write_info(path, writer.close(), writer.fingerprint.hex())


def write_info(path: Path, split: dict, fingerprint: str) -> None:
    """``dataset.json`` of a dataset of captions with one split."""
    info = make_info(
        kind="caption",
        vocab_size=1000,
        tokenizer_sha256="0" * 64,
        image_size=224,
        patch_size=14,
        max_length=1024,
        splits={"train": split},
        fingerprints={"train": fingerprint},
    )
    (path / "dataset.json").write_text(json.dumps(info))


def loader_table(paths: list[str], row_length: int, seconds: float = 5) -> Table:
    config = DataConfig(sources={Path(p).name: SourceConfig(path=p) for p in paths}, row_length=row_length, workers=1)
    datasets = open_sources(config, "train")
    plan = build_pack_plan(datasets, [1.0] * len(paths), config)
    table = Table(title=f"loader, one worker process, batches of 8 rows of {row_length}")
    for column in ("start at step", "first batch, s", "rows/s", "tokens/s", "images/s"):
        table.add_column(column, justify="right")
    patches = patches_per_image(datasets[0].info["image_size"], datasets[0].info["patch_size"])
    for start in (0, 2000):
        plan.ensure((start + 1) * 8)
        began = time.perf_counter()
        batches = iter(Loader(plan, datasets, config, global_batch_rows=8, start_step=start, end_step=10**9))
        next(batches)
        first = time.perf_counter() - began
        rows = tokens = num_images = 0
        began = time.perf_counter()
        while (spent := time.perf_counter() - began) < seconds:
            (batch,) = next(batches)
            rows += 8
            tokens += int((batch.hi >= batch.lo).sum())
            num_images += len(batch.patches) // patches
        batches.close()
        rates = (f"{n / spent:,.0f}" for n in (rows, tokens, num_images))
        table.add_row(str(start), f"{first:.2f}", *rates)
    return table


def make_lengths(path: Path, num_documents: int) -> None:
    """A dataset of nothing but lengths, which is all that a plan needs: 210 positions a document in the mean."""
    rng = np.random.default_rng(0)
    text = np.minimum(700, rng.lognormal(4.5, 0.8, num_documents)).astype(np.int32) + 5
    lengths = np.stack([text, rng.choice(np.array([0, 64, 256], np.int32), num_documents)], axis=1)
    (path / "train").mkdir(parents=True)
    np.save(path / "train" / "lengths.npy", lengths)
    shards = [
        {"file": f"shard-{start}.arrow", "num_documents": n, "num_bytes": 1, "sha256": "0" * 64}
        for start in range(0, num_documents, SHARD_DOCUMENTS)
        if (n := min(SHARD_DOCUMENTS, num_documents - start))
    ]
    text_tokens, patches = lengths.sum(0, dtype=np.int64).tolist()
    split = {
        "lengths_sha256": lengths_digest(lengths),
        "num_documents": num_documents,
        "num_text_tokens": text_tokens,
        "num_patches": patches,
        "num_images": 0,
        "shards": shards,
    }
    write_info(path, split, "0" * 64)


def start_table(folder: Path, num_documents: int, far: int) -> Table:
    """What a run waits for before its first step, with rows of 1024 and windows of 1M tokens."""
    # In a process of its own, whose memory does not count here.
    maker = multiprocessing.Process(target=make_lengths, args=(folder / "lengths", num_documents))
    maker.start()
    maker.join()
    table = Table(title=f"before the first step: {num_documents:,} documents, row {far:,}")
    for column in ("what", "seconds", "MB more"):
        table.add_column(column, justify="right")

    def measure(what: str, work: Callable[[], PackPlan]) -> PackPlan:
        peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        plan = work()
        seconds = time.perf_counter() - began
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        table.add_row(what, f"{seconds:.3f}", f"{grown / 1024:.0f}")
        return plan

    def opened() -> PackPlan:
        dataset = ShardedDataset(folder / "lengths", "train")
        cache = folder / "index"
        return PackPlan([dataset], [1.0], row_length=1024, window_tokens=1_000_000, seed=0, cache_dir=cache)

    def at(plan: PackPlan, row: int) -> PackPlan:
        plan.ensure(row + 1)
        plan.row(row)
        return plan

    plan = measure("open", opened)
    measure("a new run: row 0", lambda: at(plan, 0))
    measure(f"row {far:,} without an index, one process", lambda: at(plan, far))
    measure(f"a run that goes on: open, row {far:,}", lambda: at(opened(), far))
    return table


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], help="folders written by tools/prepare_data.py")
    parser.add_argument("--rows", nargs="+", type=int, default=[1024, 1280, 2048, 4096], help="row lengths")
    parser.add_argument("--window-tokens", type=int, default=1_000_000)
    parser.add_argument("--documents", type=int, default=10_000_000, help="of the dataset that is opened and planned")
    parser.add_argument("--far", type=int, default=1_000_000, help="a row to begin at; 0 leaves this table out")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(padding_table(args))
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            make_captions(Path(folder) / "captions", 500)
        if args.far:
            # Before the loader: its memory would hide what opening takes.
            console.print(start_table(Path(folder), args.documents, args.far))
        console.print(loader_table(args.data or [f"{folder}/captions"], args.rows[0]))


if __name__ == "__main__":
    exit_on_error(main)
