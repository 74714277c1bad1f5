"""Spread of work between data-parallel ranks: rows dealt by work beside rows dealt in the order of the batch.

    python benchmarks/balance.py [--data DIR ...] [--ranks 8 64] [--row-length 1024 4096] [--batches 20]

Without ``--data``: a 45-45-10 mixture of captions, interleaved pages and text with documents of realistic lengths
(the generator of benchmarks/packing.py), packed by the pack plan. Work is FLOPs of an early-fusion model. Ranks times
micro-batches as the number of ranks shows how even the micro-batches are.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from megamm_laws.arguments import ArgumentParser
from packing import SHARES, draw_lengths
from rich.console import Console
from rich.table import Table

from megamm.config import ModelConfig
from megamm.data.balance import deal_rows, row_contents, row_costs, spread
from megamm.data.dataset_info import make_info
from megamm.data.pack_plan import PackPlan
from megamm.data.shards import SCHEMA, ShardedDataset, lengths_digest
from megamm.errors import exit_on_error
from megamm.model.counts import flops_weights
from megamm.model.sizes import resolve_model
from megamm.sequence import patches_per_image

IMAGE, PATCH = 224, 14


def make_lengths(path: Path, kind: str, num_tokens: int, row_length: int) -> None:
    """A dataset that has lengths only: what the pack plan and the deal read."""
    patches = patches_per_image(IMAGE, PATCH)
    total = draw_lengths(kind, num_tokens, row_length, patches, np.random.default_rng(0))
    rng, images = np.random.default_rng(1), np.zeros(len(total), np.int64)
    if kind == "caption":
        images[:] = 1
    elif kind == "interleaved":  # a paragraph of about 100 tokens for each image, as it was drawn
        images = np.minimum(
            total // (patches + 1), np.round(total / (patches + 100) + rng.uniform(-0.3, 0.3, len(total)))
        )
    lengths = np.stack([total - patches * images, patches * images], 1).astype(np.int32)
    (path / "train").mkdir(parents=True)
    with pa.OSFile(str(path / "train/0.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA):
        pass
    np.save(path / "train/lengths.npy", lengths)
    shard = {"file": "0.arrow", "num_documents": len(lengths), "num_bytes": 1, "sha256": "0" * 64}  # never read
    text, in_images = map(int, lengths.sum(0, dtype=np.int64))
    counts = {"num_text_tokens": text, "num_patches": in_images, "num_images": in_images // patches}
    split = {"num_documents": len(lengths), "lengths_sha256": lengths_digest(lengths), **counts, "shards": [shard]}
    info = make_info(
        kind=kind,
        vocab_size=1000,
        tokenizer_sha256="0" * 64,
        image_size=IMAGE,
        patch_size=PATCH,
        max_length=row_length,
        splits={"train": split},
        fingerprints={"train": "0" * 64},
    )
    (path / "dataset.json").write_text(json.dumps(info))


def table_of(datasets: list[ShardedDataset], args: argparse.Namespace, row_length: int) -> Table:
    info = datasets[0].info
    weights = list(SHARES.values()) if len(datasets) == len(SHARES) else [1.0] * len(datasets)
    plan = PackPlan(datasets, weights, row_length=row_length, window_tokens=args.window_tokens, seed=0)
    table = Table(title=f"rows of {row_length}, batches of {args.tokens // row_length} rows: work between ranks")
    for name in ("model width", "ranks", "in order, %", "by work, mean %", "by work, worst %", "ms a batch"):
        table.add_column(name, justify="right")
    rows = args.tokens // row_length
    contents = [row_contents(plan, range(k * rows, (k + 1) * rows)) for k in range(args.batches)]
    for width in args.widths:
        model = ModelConfig(width=width, vocab_size=50432, image_size=info["image_size"], patch_size=info["patch_size"])
        weight = flops_weights(resolve_model(model))._asdict()
        for ranks in args.ranks:
            if rows % ranks:
                continue
            in_order, by_work, began = [], [], time.perf_counter()
            for one in contents:
                costs = row_costs(one, row_length, **weight)
                by_work.append(spread(costs, deal_rows(costs, ranks)))
                in_order.append(spread(costs, np.arange(rows).reshape(ranks, -1)))
            spent = 1000 * (time.perf_counter() - began) / len(contents)
            cells = (np.mean(in_order), np.mean(by_work), np.max(by_work))
            table.add_row(str(width), str(ranks), *(f"{100 * x:.3f}" for x in cells), f"{spent:.1f}")
    return table


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], help="folders written by tools/prepare_data.py")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 256])
    parser.add_argument("--widths", nargs="+", type=int, default=[800, 2208], help="widths of the model")
    parser.add_argument("--row-length", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--tokens", type=int, default=2**21, help="positions of a batch")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--window-tokens", type=int, default=1_000_000)
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    for row_length in args.row_length:
        with tempfile.TemporaryDirectory() as folder:
            paths = args.data
            if not paths:
                paths = [f"{folder}/{kind}" for kind in SHARES]
                for kind, path in zip(SHARES, paths, strict=True):
                    tokens = int(1.2 * args.tokens * args.batches * SHARES[kind])
                    make_lengths(Path(path), kind, tokens, row_length)
            console.print(table_of([ShardedDataset(path, "train") for path in paths], args, row_length))


if __name__ == "__main__":
    exit_on_error(main)
