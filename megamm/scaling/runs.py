"""Tables of finished runs: collected from logs, written and read as `runs.csv`, checked row by row.

A row is a dictionary with the columns of `runs.csv`: ``run, architecture, mixture, params, params_active,
tokens, flops, loss``, a ``loss_*`` per source (nats), and two of our own: ``trunk`` (the run directory whose
constant-rate steps this run shares with others; empty if none) and ``cooled`` (true if its learning rate was
cooled down). Columns beyond these are kept, so that a fit can be grouped by them.

To collect from another kind of log, add a function to :data:`READERS`.
"""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megamm.errors import InputError
from megamm.files import write_text

COLUMNS = ("run", "architecture", "mixture", "params", "params_active", "tokens", "flops", "loss")
LOSS_COLUMNS = ("loss_text", "loss_caption", "loss_interleaved")
OWN_COLUMNS = ("trunk", "cooled")
REQUIRED = ("params", "tokens", "loss")
POSITIVE = ("params", "params_active", "tokens", "flops")


@dataclass(kw_only=True)
class RunTable:
    """Checked runs; numbers are floats, and a loss that was not measured is None."""

    path: str
    rows: list[dict[str, Any]]
    lines: list[int]
    """Line of each row in the file, the header being line 1."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))

    @property
    def loss_columns(self) -> list[str]:
        """``loss`` and every ``loss_*`` column."""
        return [c for c in self.columns if c == "loss" or c.startswith("loss_")]

    @property
    def names(self) -> list[str]:
        """Name of each run; where the table has none, its line."""
        return [row.get("run") or f"line {line}" for row, line in zip(self.rows, self.lines)]

    @property
    def places(self) -> list[str]:
        """Line of each run, followed by its name if it has one."""
        return [
            f"line {line} (run {row['run']})" if row.get("run") else f"line {line}"
            for row, line in zip(self.rows, self.lines)
        ]

    def numbers(self, column: str) -> np.ndarray:
        """A column of numbers as float64 (n,); NaN where empty."""
        return np.array([np.nan if row.get(column) is None else row[column] for row in self.rows], float)

    def select(self, keep: Iterable[bool]) -> "RunTable":
        """The rows for which ``keep`` is true."""
        picked = [i for i, k in enumerate(keep) if k]
        return RunTable(path=self.path, rows=[self.rows[i] for i in picked], lines=[self.lines[i] for i in picked])

    def groups(self, column: str | None) -> dict[str, "RunTable"]:
        """Tables by the values of ``column``, in order of appearance; one table, `all`, where it is None.

        Raises:
            InputError: the column does not exist or a row has no value in it.
        """
        if column is None:
            return {"all": self}
        if column not in self.columns:
            raise InputError(f"{self.path}: no column {column!r} to group by; has {', '.join(self.columns)}")
        values = ["" if row.get(column) is None else str(row[column]) for row in self.rows]
        for value, place in zip(values, self.places):
            if not value:
                raise InputError(f"{self.path}: {place}: column {column!r} is empty; fill it in")
        return {v: self.select(x == v for x in values) for v in dict.fromkeys(values)}


# ---------------------------------------------------------------------------------------------- the CSV file


def read_runs(path: Path | str) -> RunTable:
    """Read and check a `runs.csv`; a missing ``flops`` becomes 6*params*tokens.

    Raises:
        InputError: unreadable, a column missing, a value that is no number or not positive, or a run
            twice; the message names the line, the run and the column.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a directory; give the runs.csv written by collect_runs.py") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; give a CSV file with the columns of runs.csv") from error
    reader = csv.reader(io.StringIO(text), skipinitialspace=True)
    rows, lines, header = [], [], None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _check_header(str(path), [cell.strip() for cell in cells])
                continue
            if len(cells) != len(header):
                raise InputError(f"{path}: line {reader.line_num}: {len(cells)} cells, the header has {len(header)}")
            rows.append(dict(zip(header, (cell.strip() for cell in cells))))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not valid CSV ({error})") from error
    if not rows:
        raise InputError(f"{path}: no runs; expected a header line and a line per run")
    return check_rows(RunTable(path=str(path), rows=rows, lines=lines))


def _check_header(path: str, header: list[str]) -> list[str]:
    missing = [c for c in REQUIRED if c not in header]
    if missing:
        raise InputError(f"{path}: line 1: no column {', '.join(missing)}; has {', '.join(header)}")
    repeated = [c for c in dict.fromkeys(header) if header.count(c) > 1]
    if repeated:
        raise InputError(f"{path}: line 1: column {', '.join(repeated)} appears twice")
    return header


def check_rows(table: RunTable) -> RunTable:
    """A new table with parsed and checked values; see :func:`read_runs`."""
    seen: dict[tuple, int] = {}
    rows = []
    for raw, line in zip(table.rows, table.lines):
        name = raw.get("run") or None
        where = f"{table.path}: line {line}" + (f" (run {name})" if name else "")
        row = dict(raw)
        for column in raw:
            if column in POSITIVE or column == "loss" or column.startswith("loss_"):
                row[column] = _number(where, column, raw[column])
        if row.get("cooled") not in (None, ""):
            row["cooled"] = _flag(where, "cooled", raw["cooled"])
        if row.get("flops") is None:
            row["flops"] = 6.0 * row["params"] * row["tokens"]
        key = (name, row.get("architecture"), row.get("mixture")) if name else tuple(row.values())
        if key in seen:
            what = "column run: the same name as" if name else "all columns equal those of"
            raise InputError(f"{where}: {what} line {seen[key]}; remove or rename one of the two")
        seen[key] = line
        rows.append(row)
    return RunTable(path=table.path, rows=rows, lines=table.lines)


def _number(where: str, column: str, value: Any) -> float | None:
    if value in (None, ""):
        if column in REQUIRED:
            raise InputError(f"{where}: column {column} is empty; fill it in or remove the row")
        return None
    try:
        number = float(value)
    except ValueError as error:
        raise InputError(f"{where}: column {column}: {value!r} is not a number") from error
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{where}: column {column}: {value} is not a finite number above zero")
    return number


def _flag(where: str, column: str, value: Any) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
    except KeyError as error:
        raise InputError(f"{where}: column {column}: {value!r} is neither true nor false") from error


def write_runs(path: Path | str, rows: list[dict[str, Any]]) -> None:
    """Write rows as `runs.csv`, whole or not at all; known columns first, empty ones only if contractual."""
    used = dict.fromkeys(k for row in rows for k in row if row[k] is not None)
    losses = [c for c in (*LOSS_COLUMNS, *used) if c.startswith("loss_") and c in used]
    header = list(dict.fromkeys([*COLUMNS, *losses, *(c for c in OWN_COLUMNS if c in used), *used]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in header])
    write_text(path, out.getvalue())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return repr(value) if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------ collecting


@dataclass(kw_only=True)
class Collected:
    """What one PATH held: rows, where each came from, and lines on what was left out."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def read_run_directories(path: Path) -> Collected | None:
    """Our run directories at or below the folder ``path``; None if it is no folder."""
    if not path.is_dir():
        return None
    found = Collected()
    for folder, subfolders, files in os.walk(path):
        subfolders.sort()
        run_dir = Path(folder)
        if "result.json" in files:
            found.rows.append(row_of_result(run_dir, path))
            found.origins.append(str(run_dir.resolve()))
        elif "config.yaml" in files:
            found.left_out.append(f"{run_dir}: unfinished (config.yaml but no result.json)")
    if not found.rows and not found.left_out:
        raise InputError(f"{path}: no run directory (a folder with result.json) at or below it")
    return found


def row_of_result(run_dir: Path, root: Path) -> dict[str, Any]:
    """The row of a finished run; ``trunk`` is given from the name of ``root`` on where it lies below.

    Raises:
        InputError: result.json is not valid or lacks a field.
    """
    path = run_dir / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(result, dict):
        raise InputError(f"{path}: expected a mapping of results")
    missing = [key for key in ("name", *REQUIRED) if result.get(key) is None]
    if missing:
        raise InputError(f"{path}: no field {', '.join(missing)}; run the training again or move the folder away")
    row = {column: result.get(column) for column in COLUMNS if column != "run"}
    row |= {"run": str(result["name"]), **_source_losses(path, result.get("losses") or {})}
    branch = result.get("branch_from")
    cooled = bool(result.get("cooled", not result.get("trunk", False)))
    trunk = Path(branch) if branch else None if cooled else run_dir
    row["trunk"] = _relative(trunk, root) if trunk else None
    row["cooled"] = cooled
    for column in POSITIVE + tuple(c for c in row if c.startswith("loss")):
        row[column] = _number(str(path), column, row[column])
    return row


def _source_losses(path: Path, losses: dict[str, Any]) -> dict[str, float]:
    """``loss_<source>``, or ``loss_<kind>`` where the kind is a standard column and the name is not."""
    by_column: dict[str, list[float]] = {}
    for source, entry in losses.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("loss"), int | float):
            raise InputError(f"{path}: losses.{source}: expected a mapping with a number 'loss'")
        column = f"loss_{source}"
        if column not in LOSS_COLUMNS and f"loss_{entry.get('kind')}" in LOSS_COLUMNS:
            column = f"loss_{entry['kind']}"
        by_column.setdefault(column, []).append(float(entry["loss"]))
    return {column: sum(values) / len(values) for column, values in by_column.items()}


def _relative(folder: Path, root: Path) -> str:
    try:
        return str(folder.resolve().relative_to(root.resolve().parent))
    except ValueError:
        return str(folder)


def read_table(path: Path) -> Collected | None:
    """A file already in the form of `runs.csv`; None if the name does not end in .csv."""
    if path.suffix.lower() != ".csv":
        return None
    table = read_runs(path)
    names = [row.get("run") or f"{path.stem}-{line}" for row, line in zip(table.rows, table.lines)]
    rows = [{**row, "run": name} for row, name in zip(table.rows, names)]
    rows = [{k: None if v == "" else v for k, v in row.items()} for row in rows]
    return Collected(rows=rows, origins=[f"{path.resolve()} line {line}" for line in table.lines])


READERS: list[Callable[[Path], Collected | None]] = [read_run_directories, read_table]
"""Tried in turn on each PATH; a reader returns None for a path that is not of its kind."""


def collect(paths: Iterable[Path | str], include_uncooled: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all ``paths`` and lines on what was left out.

    A run directory reached twice counts once. Trunks (constant learning rate, never cooled down) are left out
    unless ``include_uncooled``: their loss is not that of a finished run.

    Raises:
        InputError: a path of no known kind, a bad value, one name for two runs, or nothing found.
    """
    rows, left_out = [], []
    origins: set[str] = set()
    named: dict[tuple, str] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path}: does not exist; give run directories or CSV files")
        found = next((c for c in (reader(path) for reader in READERS) if c is not None), None)
        if found is None:
            raise InputError(f"{path}: not a kind of log that is known; give run directories or CSV files")
        left_out += found.left_out
        for row, origin in zip(found.rows, found.origins):
            if origin in origins:
                continue
            origins.add(origin)
            if row.get("cooled") is False and not include_uncooled:
                left_out.append(f"{origin}: not cooled down (a trunk); --include-uncooled takes it in")
                continue
            key = (row["run"], row.get("architecture"), row.get("mixture"))
            if key in named:
                raise InputError(f"{origin}: run {row['run']} is also in {named[key]}; rename or remove one")
            named[key] = origin
            rows.append(row)
    if not rows:
        raise InputError(f"no finished run in {', '.join(map(str, paths))} ({len(left_out)} left out)")
    return rows, left_out
