"""Collect runs from training logs into one table, runs.csv.

Reads our run directories, TensorBoard event files, the output of Megatron-LM, torchtitan, nanotron, OLMo-core, Composer
and nanoGPT, metrics.jsonl of lingua, trainer_state.json of transformers, exports of Weights & Biases (CSV or JSON
lines) and tables in the form of runs.csv. What was left out, likely slips of units, and how other conventions would
count the FLOPs, go to stderr.
"""

import argparse
import sys
from collections.abc import Iterable

from rich.console import Console

from megamm_laws.arguments import ArgumentParser
from megamm_laws.errors import InputError, exit_on_error
from megamm_laws.files import check_out
from megamm_laws.runs.collect import LOSSES, CollectOptions, collect, parse_facts, read_facts
from megamm_laws.runs.conventions import COLUMN, CONVENTIONS, conversion_lines
from megamm_laws.runs.table import suspected_duplicates, suspicious_units, write_runs


def parser() -> ArgumentParser:
    """The command line."""
    counted = "\n".join(f"  {c.name:<13} {c.explained}" for c in CONVENTIONS.values())
    made = ArgumentParser(
        description=__doc__,
        epilog=f"conventions:\n{counted}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("paths", nargs="+", metavar="PATH", help="log file, table, or folder that is searched for logs")
    made.add_argument("--out", default="runs.csv", help="table to write (default: %(default)s)")
    made.add_argument(
        "--flops-convention",
        choices=list(CONVENTIONS),
        help="count params and FLOPs of all runs by this (default: as each source counted, which must be one way)",
    )
    made.add_argument(
        "--loss",
        choices=LOSSES,
        default="auto",
        help="final loss from logs; auto: validation where there is any (default: %(default)s)",
    )
    made.add_argument(
        "--include-uncooled",
        action="store_true",
        help="also take in runs whose learning rate was not cooled down, such as trunks",
    )
    made.add_argument(
        "--include-intermediate",
        action="store_true",
        help="also take in validations before the end, as rows RUN@STEP marked checkpoint=intermediate",
    )
    made.add_argument("--facts", metavar="CSV", help="table with a column run and columns that the logs lack (params)")
    made.add_argument(
        "--set", action="append", default=[], metavar="COLUMN=VALUE", help="such a column for every run; repeatable"
    )
    made.add_argument(
        "--map", action="append", default=[], metavar="NAME=TAG", help="tag of a log that means NAME; repeatable"
    )
    made.add_argument(
        "--allow", action="store_true", help="take in losses that were measured on unlike validation sets, too"
    )
    return made


def main() -> None:
    arguments = parser().parse_args()
    check_out(arguments.out, folder=False)
    facts = read_facts(arguments.facts) if arguments.facts else {}
    facts["*"] = parse_facts(dict(_pairs("--set", arguments.set, key=0)), "--set")
    options = CollectOptions(
        loss=arguments.loss,
        include_uncooled=arguments.include_uncooled,
        include_intermediate=arguments.include_intermediate,
        convention=arguments.flops_convention,
        # key=1: several tags may mean one name, but no tag two names.
        mapping={tag: name for name, tag in _pairs("--map", arguments.map, key=1)},
        facts=facts,
        allow_unlike=arguments.allow,
    )
    with Console(stderr=True).status("reading runs") as status:
        rows, left_out = collect(arguments.paths, options, status.update)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    for line in conversion_lines(rows):
        print(f"convention: {line}", file=sys.stderr)
    for line in suspicious_units(rows, [row["run"] for row in rows]):
        print(f"warning: {line}", file=sys.stderr)
    for line in suspected_duplicates(rows, [row["run"] for row in rows]):
        print(f"note: {line}", file=sys.stderr)
    unknown = sum(row.get("cooled") is None for row in rows)
    if unknown:
        print(f"note: the learning rate of {unknown} runs is not known: column cooled is empty there", file=sys.stderr)
    write_runs(arguments.out, rows)
    print(f"{len(rows)} runs, counted as {rows[0][COLUMN]} -> {arguments.out}")


def _pairs(option: str, values: Iterable[str], key: int) -> list[tuple[str, str]]:
    """Name and value of each NAME=VALUE, of which the part numbered ``key`` may not come twice."""
    pairs = []
    for text in values:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise InputError(f"{option}: {text} is not of the form NAME=VALUE")
        pairs.append((name, value))
    keys = [pair[key] for pair in pairs]
    for repeated in (k for k in keys if keys.count(k) > 1):
        raise InputError(f"{option}: {repeated} is given twice; give it once")
    return pairs


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
