"""Compare two groups of runs by their fits: who is ahead at which compute, and by how much.

Says it under several counts of FLOPs: as in the table (front end counted), without the image encoder, and with every
matrix product, as far as the table has the columns. Writes comparison.json, comparison.md and pictures (PNG, PDF).
"""

import argparse
import math
import sys

from rich.console import Console

from megamm_laws.arguments import ArgumentParser
from megamm_laws.comparison.compare import check_flops, crossover_sentence, verdict
from megamm_laws.comparison.outputs import compare_fits, write_comparison
from megamm_laws.comparison.recounted import COUNTED
from megamm_laws.errors import InputError, exit_on_error
from megamm_laws.files import check_out
from megamm_laws.runs.table import read_runs


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fits", metavar="FITS_DIR", help="folder written by fit_scaling_laws.py")
    parser.add_argument("--runs", required=True, metavar="runs.csv", help="the table that was fitted")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--groups", metavar="A,B", help="the two groups (default: early,late, or the only two)")
    parser.add_argument("--loss", "--loss-column", default="loss", metavar="COLUMN", help="default: %(default)s")
    parser.add_argument(
        "--at",
        metavar="FLOPS",
        default="",
        help="FLOPs, with commas, at which to say how much more compute B needs (default: the largest common one)",
    )
    parser.add_argument(
        "--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="FLOPs (default: where both groups have runs)"
    )
    arguments = parser.parse_args()
    for end in arguments.range or ():
        check_flops(end, "--range")
    check_out(arguments.out, folder=True)
    with Console(stderr=True).status("comparing"):
        report = compare_fits(
            arguments.fits,
            read_runs(arguments.runs),
            groups=[name.strip() for name in arguments.groups.split(",")] if arguments.groups else None,
            loss_column=arguments.loss,
            flops_range=tuple(arguments.range) if arguments.range else None,
            at=[_flops(text) for text in arguments.at.split(",") if text.strip()],
        )
        written = write_comparison(arguments.out, report)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    for text in report.warnings:
        print(f"warning {text}", file=sys.stderr)
    print(f"matched runs: {report.pairing_sentence}")
    for one in report.accounted:
        print(f"{COUNTED[one.counting]}:")
        sentences = [verdict(one.comparison, report.at), crossover_sentence(one.comparison)]
        for sentence in [*sentences, *(gain.sentence for gain in report.gains[one.counting])]:
            print(f"  {sentence}")
    print(f"-> {', '.join(str(path) for path in written)}")


def _flops(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"--at: {text.strip()!r} is not a number of FLOPs above zero")
    check_flops(value, "--at")
    return value


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
