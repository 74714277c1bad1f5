#!/usr/bin/env python
"""Collect finished runs into one table, runs.csv."""

import argparse
import sys

from rich.console import Console

from megamm.errors import exit_on_error
from megamm.scaling.runs import collect, write_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folder searched for run directories, or a runs.csv")
    parser.add_argument("--out", default="runs.csv", help="table to write (default: %(default)s)")
    parser.add_argument(
        "--include-uncooled",
        action="store_true",
        help="also take in trunks, runs at constant learning rate without a cool-down",
    )
    arguments = parser.parse_args()
    with Console(stderr=True).status("reading runs"):
        rows, left_out = collect(arguments.paths, include_uncooled=arguments.include_uncooled)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    write_runs(arguments.out, rows)
    print(f"{len(rows)} runs -> {arguments.out}")


if __name__ == "__main__":
    exit_on_error(main)
