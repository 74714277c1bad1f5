"""Propose the runs that shrink the interval of a decision most for a budget of FLOPs."""

import sys

from rich.console import Console

from megamm_laws.arguments import ArgumentParser, not_negative
from megamm_laws.errors import exit_on_error
from megamm_laws.files import check_out
from megamm_laws.proposals.next_runs import DECISIONS, RunsRequest, choose_runs, to_markdown, write_next_runs
from megamm_laws.runs.table import read_runs


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in DECISIONS.items())
    add("runs", metavar="runs.csv", help="the runs so far, as written by collect_runs.py")
    add("--budget", type=float, required=True, metavar="C", help="FLOPs for further runs, counted as the runs' are")
    add("--decision", default="params", help=f"{meanings} (default: %(default)s)")
    add("--at", type=float, metavar="C", help="FLOPs that it is about (default: 10 times the largest run)")
    add("--group", nargs="+", dest="groups", metavar="NAME", help="one group, or two for a difference")
    add("--group-by", metavar="COLUMN", help="default: architecture if given")
    add("--loss-column", default="loss", metavar="COLUMN", help="default: %(default)s")
    add("--max-run-flops", type=float, metavar="C", help="of one run (default: the budget)")
    add("--max-params", type=float, metavar="N", help="default: up to 10 times the largest so far")
    add("--max-tokens", type=float, metavar="D", help="default: up to 10 times the longest so far")
    add("--ratios", nargs=2, type=float, metavar="R", help="range of tokens per parameter (default: as so far)")
    add("--max-runs", type=int, default=20, metavar="K", help="default: %(default)s")
    add("--bootstrap", dest="resamples", type=int, default=1000, metavar="R", help="default: %(default)s")
    add("--seed", type=not_negative, default=0, help="default: %(default)s")
    add("--out", default="next", metavar="DIR", help="folder for the results (default: %(default)s)")
    arguments = vars(parser.parse_args())
    runs, out = arguments.pop("runs"), arguments.pop("out")
    check_out(out, folder=True)
    with Console(stderr=True).status("reading runs") as status:
        plan = choose_runs(read_runs(runs), RunsRequest(**arguments), progress=status.update)
        written = write_next_runs(out, plan)
    for text in plan["warnings"]:
        print(f"warning {text}", file=sys.stderr)
    print(to_markdown(plan))
    print(f"-> {', '.join(str(path) for path in written)}")


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
