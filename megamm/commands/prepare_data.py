"""Prepare one data source for training: shards of token ids and resized images, with dataset.json.

An INPUT is a folder of HTML or Markdown pages with their images, a folder of pictures with caption files
(x.png + x.txt), a folder of text files, a single such file, a table (.jsonl, .csv, .tsv, .parquet, webdataset
.tar) or a generator (scenes:caption, scenes:interleaved, scenes:text).

Example: tools/prepare_data.py pages/ --out data/pages --tokenizer tokenizer.json --workers 8
"""

import argparse
import os
from typing import get_args

from megamm_laws.arguments import ArgumentParser, not_negative
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megamm.config import Fit
from megamm.data.dataset_info import KINDS, repeats_line
from megamm.data.images import DEFAULT_FIT
from megamm.data.prepare import PrepareSettings, prepare
from megamm.data.verify import verify
from megamm.errors import exit_on_error
from megamm.extras import require
from megamm.files import check_out


def main() -> None:
    parser = make_parser()
    arguments = vars(parser.parse_args())
    folder = arguments.pop("verify")
    if folder is not None:
        verify_folder(folder)
        return
    missing = [name for name in ("inputs", "out", "tokenizer") if not arguments[name]]
    if missing:
        parser.error(f"missing: {', '.join('INPUT' if name == 'inputs' else f'--{name}' for name in missing)}")
    out, workers, ray = arguments.pop("out"), arguments.pop("workers"), arguments.pop("ray")
    if ray:
        require("ray", "--ray")
    check_out(out, folder=True)
    settings = PrepareSettings(**arguments | {"inputs": tuple(arguments["inputs"])})
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[skipped]} skipped"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("preparing", total=None, skipped=0)
        info = prepare(
            settings,
            out,
            workers,
            lambda done, total, skipped: progress.update(bar, completed=done, total=total, skipped=skipped),
            ray,
        )
    print_summary(info, out)


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="folder, file or scenes:KIND")
    add("--out", metavar="DIR", help="folder to write; a dataset already there is replaced")
    add("--verify", metavar="DIR", help="only check a prepared dataset: every checksum, length and fingerprint")
    add("--kind", choices=("auto", *KINDS), default="auto", help="which files to read; auto: the kind of most files")
    add("--tokenizer", metavar="FILE", help="tokenizer.json, from tools/train_tokenizer.py")
    add("--image-size", type=int, default=224, help="height and width in pixels (default 224); native: see --fit")
    add("--patch-size", type=int, default=14, help="divides the image size (default 14)")
    add("--max-length", type=int, default=1024, help="positions above which a document is cut in parts (1024)")
    native = "native keeps each one's shape, with at most as many patches as a square of --image-size has"
    add("--fit", choices=get_args(Fit), default=DEFAULT_FIT, help=f"how images become square (%(default)s); {native}")
    add("--val-fraction", type=float, default=0.02, help="share of tokens held out for validation (0.02)")
    add("--min-tokens", type=int, default=1, help="leave out documents of fewer text tokens (1)")
    add("--max-pixels", type=int, default=50_000_000, help="refuse larger images, before decoding (50 million)")
    add("--limit", type=int, help="stop after this many documents")
    add("--num-documents", type=int, default=10_000, help="documents of a scenes: input (10000)")
    add("--seed", type=not_negative, default=0, help="seed of scenes: inputs (0)")
    add("--workers", type=int, default=os.cpu_count(), help="processes; the output does not depend on it")
    add(
        "--ray", action="store_true", help="read on the Ray cluster of RAY_ADDRESS, or on a local one of --workers CPUs"
    )
    return parser


def verify_folder(folder: str) -> None:
    """Check a prepared dataset and say so on stdout."""
    with Progress(
        TextColumn("checking"), TextColumn("{task.completed} documents"), console=Console(stderr=True)
    ) as bars:
        bar = bars.add_task("", total=None)
        info = verify(folder, lambda done: bars.update(bar, completed=done))
    count = sum(split["num_documents"] for split in info["splits"].values())
    print(f"{folder}: all {count} documents are as they were written")


def print_summary(info: dict, out: str) -> None:
    """Counts and mean lengths per split, and skipped inputs by reason, on stdout."""
    console = Console()
    table = Table(title=f"{out}: {info['kind']}")
    names = ("documents", "images", "text tokens", "patches", "mean text tokens", "mean patches")
    for name in ("split", *names):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, counts in info["splits"].items():
        number = counts["num_documents"]
        totals = [number, counts["num_images"], counts["num_text_tokens"], counts["num_patches"]]
        means = [counts["num_text_tokens"] / number, counts["num_patches"] / number]
        table.add_row(split, *(f"{n:,}" for n in totals), *(f"{n:.1f}" for n in means))
    console.print(table)
    if line := repeats_line(info):
        print(line)
    if info["num_skipped"]:
        table = Table(title=f"skipped: {info['num_skipped']:,} (listed in skipped.jsonl)", min_width=48)
        table.add_column("reason")
        table.add_column("number", justify="right")
        for reason, count in info["skipped_by_reason"].items():
            table.add_row(reason, f"{count:,}")
        console.print(table)


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
