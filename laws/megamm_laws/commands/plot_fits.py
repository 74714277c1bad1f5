"""Draw fits for a paper: frontiers with bands, residuals against N, D and C, correlations, hold-out (PNG and PDF)."""

from pathlib import Path

from rich.console import Console

from megamm_laws.arguments import ArgumentParser
from megamm_laws.comparison.recounted import group_column, recount, runs_of
from megamm_laws.errors import InputError, exit_on_error
from megamm_laws.files import check_out
from megamm_laws.fitting.fits_file import check_runs, read_plain_fits
from megamm_laws.fitting.pictures import colours, group_of
from megamm_laws.pictures.plots import fit_charts, write_charts
from megamm_laws.runs.table import read_runs


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("fits", metavar="FITS_DIR", type=Path, help="folder written by fit_scaling_laws.py")
    parser.add_argument("--runs", required=True, metavar="runs.csv", help="the table that was fitted")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--loss", "--loss-column", default="loss", metavar="COLUMN", help="default: %(default)s")
    arguments = parser.parse_args()
    check_out(arguments.out, folder=True)
    with Console(stderr=True).status("drawing"):
        table, fits = read_runs(arguments.runs), read_plain_fits(arguments.fits, arguments.loss)
        if not fits:
            raise InputError(f"{arguments.fits}: no fit of {arguments.loss} whose frontier can be drawn")
        column, palette, groups = group_column(table, set(fits)), colours(list(fits)), []
        for name, fit in fits.items():
            runs = runs_of(table, column, name, arguments.loss)
            check_runs(fit, runs, arguments.fits)
            # fits.json has one factor for the FLOPs; how it grows with size is read off the runs.
            law, _ = recount(fit.plain_law, runs, "counted")
            groups.append(group_of(law, runs, arguments.loss, fit.entry, name=name, colour=palette[name]))
        written = write_charts(arguments.out, fit_charts(groups, arguments.loss))
    print(f"-> {', '.join(str(path) for path in written)}")


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
