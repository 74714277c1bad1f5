"""Compute-optimal sizes from isoFLOP profiles: isoflops.json, isoflops.md and plots."""

import sys

from rich.console import Console

from megamm_laws.arguments import ArgumentParser, not_negative
from megamm_laws.errors import exit_on_error
from megamm_laws.files import check_out
from megamm_laws.fitting.isoflop import NOISE, fit_isoflop_table
from megamm_laws.fitting.isoflop_outputs import write_isoflops
from megamm_laws.runs.table import read_runs


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", metavar="runs.csv", help="table written by collect_runs.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--group-by", metavar="COLUMN", help="fit each value of this column apart (default: architecture if given)"
    )
    parser.add_argument("--losses", default="loss", metavar="COLUMNS", help="columns, with commas, or 'all'")
    parser.add_argument(
        "--noise",
        type=float,
        help=f"spread of a loss between seeds, nats (default: from the roughness of the curves, at least {NOISE})",
    )
    parser.add_argument("--draws", type=int, default=1000, help="noise draws for the intervals (default: %(default)s)")
    parser.add_argument("--seed", type=not_negative, default=0, help="seed of the draws (default: %(default)s)")
    arguments = parser.parse_args()
    check_out(arguments.out, folder=True)
    with Console(stderr=True).status("reading runs") as status:
        fits = fit_isoflop_table(
            read_runs(arguments.runs),
            group_by=arguments.group_by,
            losses=arguments.losses,
            noise=arguments.noise,
            draws=arguments.draws,
            seed=arguments.seed,
            progress=status.update,
        )
        written = write_isoflops(arguments.out, fits)
    for fit in fits:
        low, high = fit.intervals["a"]
        print(
            f"{fit.group}, {fit.loss_column}: {len(fit.used)} budgets, N* ~ C^{fit.exponents['a']:.4f} "
            f"[{low:.4f}, {high:.4f}], {len(fit.warnings)} warnings"
        )
        for text in fit.warnings:
            print(f"warning: {fit.group}, {fit.loss_column}: {text}", file=sys.stderr)
    print(f"-> {', '.join(str(path) for path in written)}")


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
