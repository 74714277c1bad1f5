"""Draw the card of a prepared dataset: one HTML page with counts, lengths, samples and what was left out."""

from pathlib import Path

from megamm_laws.arguments import ArgumentParser

from megamm.errors import exit_on_error
from megamm.files import check_out, write_text


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("dataset", metavar="DIR", help="folder of tools/prepare_data.py")
    parser.add_argument("--out", metavar="FILE", default="card.html", help="page to write (card.html)")
    arguments = parser.parse_args()
    check_out(arguments.out, folder=False)
    from megamm.report.data_card import data_card  # torch is slow to import

    write_text(Path(arguments.out), data_card(arguments.dataset))
    print(arguments.out)


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
