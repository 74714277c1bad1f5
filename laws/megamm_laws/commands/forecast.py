"""Forecast the loss of a run before it is trained, score the forecast afterwards, and keep the record.

Examples:
  tools/forecast.py write fits --plan plan.json --by "Ada L." --out forecasts/big.json
  tools/forecast.py score forecasts/big.json runs/full
  tools/forecast.py record forecasts
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megamm_laws.arguments import ArgumentParser
from megamm_laws.errors import InputError, exit_on_error
from megamm_laws.files import check_out, read_json, write_json, write_text
from megamm_laws.fitting.fits_file import read_fits_file
from megamm_laws.forecasts.forecast import PlannedRun, make_forecast, read_forecast, score_forecast
from megamm_laws.forecasts.record import Line, read_forecasts, summary, to_markdown
from megamm_laws.pictures.units import count, digits
from megamm_laws.runs.collect import CollectOptions, collect
from megamm_laws.runs.table import read_runs


def _parser() -> ArgumentParser:
    """The command line."""
    made = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True, metavar="write|score|record")
    write = commands.add_parser("write", help="predict a run's losses, with date, name and intervals")
    add = write.add_argument
    add("fits", metavar="FITS", type=Path, help="fits.json of tools/fit_scaling_laws.py, or its folder")
    add("--out", required=True, metavar="FILE", type=Path, help="forecast to write; an existing one is never replaced")
    add("--by", required=True, metavar="NAME", help="who signs the forecast off")
    add("--plan", metavar="plan.json", type=Path, help="the run that tools/plan_training.py planned")
    add("--params", type=float, metavar="N", help="or: parameters of the run")
    add("--tokens", type=float, metavar="D", help="and its tokens")
    add("--group", metavar="NAME", help="of the fits; by default the plan's, or the only one")
    add("--architecture", metavar="NAME", help="of the run, compared when it is scored; by default the plan's")
    add("--mixture", metavar="NAME", help="likewise")
    add("--runs", metavar="runs.csv", type=Path, help="the fitted runs, whose validation set the run has to share")
    add("--note", default="", metavar="TEXT", help="kept with the forecast")
    score = commands.add_parser("score", help="compare a finished run with its forecast")
    add = score.add_argument
    add("forecast", metavar="FORECAST", type=Path, help="file of the forecast")
    add("result", metavar="RESULT", type=Path, help="run directory, log, or run table")
    add("--run", metavar="NAME", help="which run of the table")
    add("--out", metavar="FILE", type=Path, help="score to write (default: FORECAST with .score.json)")
    add("--allow", action="store_true", help="score a run of other size, architecture, mixture or validation set, too")
    record = commands.add_parser("record", help="all forecasts of a folder, and how often they were right")
    record.add_argument("folder", metavar="DIR", type=Path, help="folder of forecasts and scores")
    record.add_argument("--out", metavar="FILE", type=Path, help="also write the table as Markdown")
    return made


def main() -> None:
    arguments = _parser().parse_args()
    {"write": _write, "score": _score, "record": _record}[arguments.command](arguments)


def _write(arguments: argparse.Namespace) -> None:
    check_out(arguments.out, folder=False)
    if arguments.out.exists():
        raise InputError(f"--out: {arguments.out} exists; a forecast is never replaced, give another name")
    forecast = make_forecast(arguments.fits, _planned(arguments), by=arguments.by, note=arguments.note)
    write_json(arguments.out, forecast)
    for text in forecast["cautions"]:
        print(f"warning: {text}", file=sys.stderr)
    run = forecast["run"]
    print(f"{run['group']}, {count(run['params'])} parameters, {count(run['tokens'])} tokens, of one run:")
    for column, said in forecast["losses"].items():
        ends = {
            share: ", ".join("open" if e is None else digits(e) for e in said["run"][share]) for share in said["run"]
        }
        print(f"  {column} {digits(said['value'])}, " + ", ".join(f"{s}% [{text}]" for s, text in ends.items()))
    print(f"-> {arguments.out}")


def _planned(arguments: argparse.Namespace) -> PlannedRun:
    """The run that is asked for, from a plan or from numbers."""
    size, plan = (arguments.params, arguments.tokens), {}
    if arguments.plan is not None:
        if size != (None, None):
            raise InputError("--plan: has params and tokens itself; leave out --params and --tokens")
        plan = read_json(arguments.plan)
        try:
            size = float(plan["model"]["params"]), float(plan["model"]["tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{arguments.plan}: model.params and model.tokens: not found ({error})") from error
    elif None in size:
        raise InputError("give the run: --plan plan.json, or --params and --tokens")
    group = arguments.group or plan.get("group")
    if group is None:
        groups = list(dict.fromkeys(fit.group for fit in read_fits_file(arguments.fits)))
        if len(groups) != 1:
            raise InputError(f"--group: the fits have {len(groups)} groups ({', '.join(groups)}); name one")
        group = groups[0]
    validation = None
    if arguments.runs is not None:
        # One set, as read_runs refuses a table of unlike ones.
        sets = {str(row["validation_set"]) for row in read_runs(arguments.runs).rows if row.get("validation_set")}
        validation = next(iter(sets)) if len(sets) == 1 else None
    return PlannedRun(
        group=group,
        params=size[0],
        tokens=size[1],
        architecture=arguments.architecture or plan.get("model", {}).get("architecture"),
        mixture=arguments.mixture,
        validation_set=validation,
    )


def _score(arguments: argparse.Namespace) -> None:
    out = arguments.out or arguments.forecast.with_suffix(".score.json")
    check_out(out, folder=False)
    forecast = read_forecast(arguments.forecast)
    row = _result(arguments.result, arguments.run)
    place = arguments.result / "result.json" if arguments.result.is_dir() else arguments.result
    written = datetime.fromtimestamp(place.stat().st_mtime, UTC) if place.is_file() else None
    score = score_forecast(forecast, row, written=written, allow=arguments.allow)
    write_json(out, score)
    for text in score["remarks"]:
        print(f"warning: {text}", file=sys.stderr)
    lines = [
        Line(name=arguments.forecast.stem, column=c, forecast=forecast, said=forecast["losses"][c], score=found)
        for c, found in score["losses"].items()
    ]
    for line in lines:
        *_, column, said, actual, error, verdict = line.cells()
        deviations = line.score["deviations"] if line.score else 0.0
        print(f"{column}: said {said}, came out {actual}: {error}, {deviations:+.1f} standard deviations, {verdict}")
    print(f"-> {out}")


def _result(path: Path, name: str | None) -> dict[str, Any]:
    """The one finished run at ``path``."""
    if not path.exists():
        raise InputError(f"{path}: not found; name a run directory, a log or a run table")
    rows, notes = collect([path], CollectOptions())
    if name is not None:
        rows = [row for row in rows if str(row.get("run")) == name]
    if not rows and notes:
        raise InputError(f"{path}: no finished run: {notes[0]}")
    if len(rows) != 1:
        found = f"{len(rows)} runs" + (f" called {name!r}" if name else "; pick one with --run" if rows else "")
        raise InputError(f"{path}: {found}; expected one finished run")
    return rows[0]


def _record(arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        check_out(arguments.out, folder=False)
    lines = read_forecasts(arguments.folder)
    if not lines:
        raise InputError(f"{arguments.folder}: no forecast in it")
    page = to_markdown(lines)
    if arguments.out is not None:
        write_text(arguments.out, page)
    print(page if arguments.out is None else f"{summary(lines)}\n-> {arguments.out}")


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
