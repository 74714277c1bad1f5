"""The best learning rate, or batch, of every size and length that was swept, and the law through them.

Examples:
  tools/fit_rates.py runs.csv --out rates --params 7e9 --tokens 1e12
  tools/fit_rates.py runs.csv --out batches --column batch_tokens
"""

import argparse
import sys

from megamm_laws.arguments import ArgumentParser, not_negative
from megamm_laws.errors import InputError, exit_on_error
from megamm_laws.files import check_out
from megamm_laws.fitting.isoflop import NOISE
from megamm_laws.runs.table import read_runs
from megamm_laws.sweeps.cells import COLUMNS
from megamm_laws.sweeps.outputs import law_text, planned_text, write_rates
from megamm_laws.sweeps.rates import fit_rates


def _parser() -> ArgumentParser:
    """The command line."""
    made = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("runs", metavar="runs.csv", help="table written by collect_runs.py, with a column lr or batch_tokens")
    add("--out", required=True, metavar="DIR", help="folder for the results")
    add("--column", default="lr", choices=list(COLUMNS), help="what was swept (default: %(default)s)")
    add("--params", type=float, metavar="N", help="parameters of a planned run")
    add("--tokens", type=float, metavar="D", help="and its tokens")
    add(
        "--used", type=float, metavar="VALUE", help="value of all ladders (default: that of runs with an empty `sweep`)"
    )
    add("--loss", default="loss", metavar="COLUMN", help="column of the losses (default: %(default)s)")
    add("--noise", type=float, help=f"spread of a loss between seeds, nats (default: measured, at least {NOISE})")
    add("--draws", type=int, default=1000, help="draws behind the intervals (default: %(default)s)")
    add("--seed", type=not_negative, default=0, help="seed of the draws (default: %(default)s)")
    return made


def main() -> None:
    arguments = _parser().parse_args()
    if (arguments.params is None) != (arguments.tokens is None):
        raise InputError("give both --params and --tokens of the planned run, or neither")
    check_out(arguments.out, folder=True)
    fits = fit_rates(
        read_runs(arguments.runs),
        column=arguments.column,
        loss_column=arguments.loss,
        used=arguments.used,
        planned=None if arguments.params is None else (arguments.params, arguments.tokens),
        noise=arguments.noise,
        draws=arguments.draws,
        seed=arguments.seed,
    )
    written = write_rates(arguments.out, fits)
    for fit in fits:
        print(f"{fit.group}: {len(fit.used)} cells, {law_text(fit)}, {len(fit.warnings)} warnings")
        if planned := planned_text(fit):
            print(f"{fit.group}: {planned}")
        for text in fit.warnings:
            print(f"warning: {fit.group}: {text}", file=sys.stderr)
    print(f"-> {', '.join(str(path) for path in written)}")


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
