"""Fit scaling laws to a table of runs: fits.json, fits.md, bootstrap.npz and plots."""

import sys
from argparse import BooleanOptionalAction
from pathlib import Path

from rich.console import Console

from megamm_laws.arguments import ArgumentParser, flops_list, not_negative
from megamm_laws.errors import exit_on_error
from megamm_laws.files import check_out
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.law.constraints import Constraints
from megamm_laws.law.forms import FORMS
from megamm_laws.law.power_law import FORMS as PLAIN_FORMS
from megamm_laws.runs.table import read_runs

SHOWN = 3
"""Warnings printed of a fit; fits.md has all."""


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", metavar="runs.csv", help="table written by collect_runs.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--group-by",
        metavar="COLUMN",
        help="fit each value of this column apart (default: architecture if given)",
    )
    parser.add_argument(
        "--losses",
        "--loss-column",
        default="loss",
        metavar="COLUMNS",
        help="column to fit, several with commas, or 'all' (default: loss)",
    )
    known = [(form.name, form.formula) for form in PLAIN_FORMS.values()]
    known += [(form.name, form.formula) for form in FORMS.values()]
    formulas = "; ".join(f"{name}: {formula}" for name, formula in known)
    parser.add_argument("--form", default="chinchilla", help=f"form of the law ({formulas}; default: %(default)s)")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="R",
        help="resamples for the intervals (default: %(default)s)",
    )
    parser.add_argument("--seed", type=not_negative, default=0, help="seed of the bootstrap (default: %(default)s)")
    parser.add_argument(
        "--rivals",
        action=BooleanOptionalAction,
        default=True,
        help="of the default form: whether other forms fit the runs as well, and what they would decide",
    )
    parser.add_argument(
        "--at",
        type=flops_list,
        default=(),
        metavar="FLOPS,...",
        help="with rivals: further budgets to give the optimum at (always: the largest run, and ten times that)",
    )
    parser.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the default form: a constant that is given, such as E=1.7; may be repeated, and holds for all groups",
    )
    parser.add_argument(
        "--tie", action="append", default=[], metavar="alpha=beta", help="of the default form: one exponent for both"
    )
    arguments = parser.parse_args()
    constraints = Constraints.of(arguments.fix, arguments.tie)
    check_out(arguments.out, folder=True)
    with Console(stderr=True).status("reading runs") as status:
        fits = fit_table(
            read_runs(arguments.runs),
            group_by=arguments.group_by,
            losses=arguments.losses,
            form=arguments.form,
            resamples=arguments.bootstrap,
            seed=arguments.seed,
            rivals=arguments.rivals,
            budgets=arguments.at,
            constraints=constraints,
            progress=status.update,
            left_out=lambda text: print(f"left out: {text}", file=sys.stderr),
        )
        written = write_fits(arguments.out, fits)
    for fit in fits:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in fit.exponents.items())
        print(f"{fit.group}, {fit.loss_column}: {len(fit.table)} runs, {numbers}, {len(fit.warnings)} warnings")
    told = 0
    for fit in fits:
        # The gravest come first. Other losses than the first mostly have the same ones.
        for text in fit.warnings[:SHOWN] if fit.loss_column == fits[0].loss_column else []:
            print(f"warning: {fit.group}, {fit.loss_column}: {text}", file=sys.stderr)
            told += 1
    rest = sum(len(fit.warnings) for fit in fits) - told
    if rest:
        print(f"{rest} more warnings are in {Path(arguments.out) / 'fits.md'}", file=sys.stderr)
    print(f"-> {', '.join(str(path) for path in written)}")


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
