"""Render a study as one HTML page that needs no network, with PNG plots beside it."""

from pathlib import Path

from megamm_laws.arguments import ArgumentParser
from rich.console import Console

from megamm.errors import exit_on_error
from megamm.files import check_out


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("study", metavar="STUDY_DIR", help="folder of tools/run_study.py with runs.csv and fits/ in it")
    parser.add_argument("--out", metavar="DIR", help="folder for index.html and plots (default: STUDY_DIR/report)")
    arguments = parser.parse_args()
    if arguments.out is not None:
        check_out(arguments.out, folder=True)
    elif Path(arguments.study).is_dir():
        check_out(Path(arguments.study) / "report", folder=True)
    with Console(stderr=True).status("drawing"):
        from megamm.report import render_report  # torch and plotly are slow to import

        page, verdict = render_report(arguments.study, arguments.out)
    print(f"{verdict}\n-> {page}")


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
