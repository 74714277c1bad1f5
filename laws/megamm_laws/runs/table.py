"""Tables of finished runs: written and read as `runs.csv`, checked row by row.

A row is a dictionary with the columns of `runs.csv`: ``run, architecture, mixture, params, params_active,
tokens, flops, loss``, a ``loss_*`` per source (nats), those of conventions.FACTS and some of our own:

* ``flops_convention``: how params and FLOPs are counted, a name in conventions.CONVENTIONS;
* ``checkpoint``: ``final`` or ``intermediate``;
* ``cooled``: whether the learning rate was cooled down there;
* ``trunk``: what the run shares steps with: the run directory of its constant-rate trunk, or the run of which it is
  an intermediate checkpoint; empty if none;
* ``validation_set``: ``SOURCE:DIGEST`` of each source whose rows the loss was measured on; empty where it is not known.

Columns beyond these are kept, so that a fit can be grouped by them.
"""

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.files import write_text
from megamm_laws.runs import conventions

COLUMNS = ("run", "architecture", "mixture", "params", "params_active", "tokens", "flops", "loss")
LOSS_COLUMNS = ("loss_text", "loss_caption", "loss_interleaved")
OWN_COLUMNS = (conventions.COLUMN, "measured_on", "checkpoint", "cooled", "trunk", "validation_set")
REQUIRED = ("params", "tokens", "loss")
POSITIVE = ("params", "params_active", "tokens", "flops", "params_total", "flops_exact")
NOT_NEGATIVE = ("params_embedding", "params_head", "params_vision", "tokens_vision")
KAPPA = (0.1, 10.0)
"""FLOPs over 6ND of any usual count."""
UNITS = {
    1e3: "FLOPs in thousands?",
    1e6: "FLOPs in MFLOP?",
    1e9: "FLOPs in GFLOP?",
    1e12: "FLOPs in TFLOP?",
    1e15: "FLOPs in PFLOP?",
    1e18: "FLOPs in EFLOP?",
    1e21: "FLOPs in ZFLOP?",
    86400e15: "FLOPs in PFLOP/s-days?",
}
"""What a column of FLOPs is a share of, by how many FLOPs one unit is."""
FEWEST_PARAMS = 1e4
PER_PARAM = (0.01, 1e6)
"""Tokens per parameter that anyone trains with."""
SMALLEST, LARGEST = 1e-6, 1e40
"""Numbers above zero outside this range are slips of the keyboard, and powers of them leave the range of floats."""


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


def read_runs(path: Path | str, *, comparable: bool = True) -> RunTable:
    """Read and check a `runs.csv`; a missing ``flops`` becomes 6*params*tokens.

    Args:
        comparable: refuse a table whose rows cannot be fitted together, see :func:`check_comparable`.

    Raises:
        InputError: unreadable, a column missing, a value that is no number or not positive, or a run
            twice; the message names the line, the run and the column.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a byte-order mark
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a directory; give the runs.csv written by collect_runs.py") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; give a CSV file with the columns of runs.csv") from error
    reader = csv.reader(io.StringIO(text), skipinitialspace=True)  # tables written by hand have spaces after commas
    rows, lines, header = [], [], None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _check_header(str(path), [cell.strip() for cell in cells])
                continue
            # line_num and no count of rows: a quoted cell may hold line breaks, and empty lines are passed over.
            if len(cells) != len(header):
                raise InputError(f"{path}: line {reader.line_num}: {len(cells)} cells, the header has {len(header)}")
            rows.append(dict(zip(header, (cell.strip() for cell in cells))))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not valid CSV ({error})") from error
    if not rows:
        raise InputError(f"{path}: no runs; expected a header line and a line per run")
    table = check_rows(RunTable(path=str(path), rows=rows, lines=lines))
    if comparable:
        check_comparable(table)
    return table


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
            if is_number(column):
                row[column] = parse_number(where, column, raw[column])
        if row.get("cooled") not in (None, ""):
            row["cooled"] = _flag(where, "cooled", raw["cooled"])
        if row.get("flops") is None:
            row["flops"] = 6.0 * row["params"] * row["tokens"]
        # One name may stand for a run of each architecture and mixture; without names, all columns must agree.
        key = (name, row.get("architecture"), row.get("mixture")) if name else tuple(row.values())
        if key in seen:
            what = "column run: the same name as" if name else "all columns equal those of"
            raise InputError(f"{where}: {what} line {seen[key]}; remove or rename one of the two")
        seen[key] = line
        rows.append(row)
    return RunTable(path=table.path, rows=rows, lines=table.lines)


def is_number(column: str) -> bool:
    """Whether a column holds numbers that are checked."""
    return column in POSITIVE + NOT_NEGATIVE or column == "loss" or column.startswith("loss_")


def parse_record(where: str, text: str) -> dict[str, Any]:
    """The JSON object on a line of a log.

    Raises:
        InputError: not JSON, or no object.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); remove the damaged line") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object; remove the damaged line")
    return record


def csv_records(path: Path, reader: csv.DictReader) -> list[tuple[int, dict[str, str]]]:
    """Line and cells by column of each row of an open CSV file.

    Raises:
        InputError: not valid CSV, or a row with more or fewer cells than the header.
    """
    rows = []
    try:
        for row in reader:
            # DictReader puts surplus cells under the key None, and None where cells are missing.
            if None in row or None in row.values():
                given = sum(value is not None for value in row.values())
                wanted = f"{len(reader.fieldnames or ())} cells as the header has"
                found = "more" if None in row else str(given)
                raise InputError(f"{path}: line {reader.line_num}: expected {wanted}, found {found}")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not valid CSV ({error})") from error
    return rows


def parse_number(where: str, column: str, value: Any) -> float | None:
    """The number in a cell, None where an optional one is empty; InputError, naming ``where``, if it is bad."""
    if value in (None, ""):
        if column in REQUIRED:
            raise InputError(f"{where}: column {column} is empty; fill it in or remove the row")
        return None
    try:
        number = float(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: column {column}: {value!r} is not a number") from error
    may_be_zero = column in NOT_NEGATIVE
    # float() reads "nan" and "inf" as well.
    if not (math.isfinite(number) and (number > 0 or (may_be_zero and number == 0))):
        wanted = "of zero or more" if may_be_zero else "above zero"
        raise InputError(f"{where}: column {column}: {value} is not a finite number {wanted}")
    if number and not SMALLEST <= number <= LARGEST:
        raise InputError(f"{where}: column {column}: {value} is not within {SMALLEST:g} to {LARGEST:g}; correct it")
    return number


def _flag(where: str, column: str, value: Any) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
    except KeyError as error:
        raise InputError(f"{where}: column {column}: {value!r} is neither true nor false") from error


# ------------------------------------------------------------------------------------- checks over all rows


def check_comparable(table: RunTable) -> None:
    """Check that the rows can be fitted together.

    Raises:
        InputError: two conventions of counting, validation and training losses, or one run under two names: rows
            that agree in every column but ``run`` and ``trunk``.
    """
    places = [f"{table.path}: {place}" for place in table.places]
    conventions.check_one_convention(table.rows, places)
    check_one_loss(table.rows, places)
    seen: dict[tuple, str] = {}
    for row, place in zip(table.rows, table.places):
        # The trunk is a path: it differs where one run was collected from two places.
        key = tuple(value for column, value in row.items() if column not in ("run", "trunk"))
        if key in seen:
            raise InputError(
                f"{table.path}: {place}: column run: another name for {seen[key]}, all other columns are equal: a "
                "duplicated run; remove one (runs of several seeds: add a column seed)"
            )
        seen[key] = place


def check_one_loss(rows: list[dict[str, Any]], places: list[str]) -> None:
    """Raise InputError where a validation and a training loss stand in one table."""
    first: tuple[str, str] | None = None
    for row, place in zip(rows, places):
        kind = row.get("measured_on")
        if not kind:
            continue
        first = first or (kind, place)
        if kind != first[0]:
            raise InputError(
                f"{place}: column measured_on: {kind}, but {first[1]} has {first[0]}: losses of two kinds; take one "
                "with tools/collect_runs.py --loss, or remove the others"
            )


def unlike_validation(rows: list[dict[str, Any]], places: list[str]) -> str | None:
    """A line on the first row that was validated on other content of a source than a row before; None if none was."""
    first: dict[str, tuple[str, str]] = {}
    for row, place in zip(rows, places):
        for part in str(row.get("validation_set") or "").split():
            source, _, digest = part.rpartition(":")
            known, at = first.setdefault(source, (digest, place))
            if known != digest:
                return f"{place}: column validation_set: source {source} is {digest}, but {at} has {known}"
    return None


def suspicious_units(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """A line per kind of count that is likely in another unit: how many runs, the first of them, and the slip."""
    found: dict[str, list[str]] = {}
    for row, name in zip(rows, names):
        n, d, c = float(row["params"]), float(row["tokens"]), float(row["flops"])
        if (slip := _slip_of_flops(c / (6 * n * d))) is not None:
            found.setdefault(f"FLOPs are not .1 to 10 times 6ND: {slip}", []).append(
                f"{name}, kappa {c / (6 * n * d):.2g}"
            )
        if n < FEWEST_PARAMS:
            slip = "params in millions or billions?" if n < 1e3 else "params in thousands?"
            found.setdefault(f"fewer than {FEWEST_PARAMS:.0e} parameters: {slip}", []).append(f"{name}, {n:.4g}")
        elif not PER_PARAM[0] <= d / n <= PER_PARAM[1]:
            slip = (
                "tokens in millions or billions, or counted in steps?" if d < n else "params in thousands or millions?"
            )
            text = f"tokens per parameter outside {PER_PARAM[0]:g} to {PER_PARAM[1]:g}: {slip}"
            found.setdefault(text, []).append(f"{name}, {d / n:.2g}")
    return [f"{len(where)} of {len(rows)} runs: {text} (the first: {where[0]})" for text, where in found.items()]


def _slip_of_flops(kappa: float) -> str | None:
    """What is likely wrong with FLOPs of ``kappa`` times 6ND; None where nothing need be."""
    if KAPPA[0] <= kappa <= KAPPA[1]:
        return None
    for factor, slip in UNITS.items():
        if KAPPA[0] <= kappa * factor <= KAPPA[1]:
            return slip
    return "FLOPs of another count, or params or tokens in another unit?"


def suspected_duplicates(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """A line per pair of rows whose params, tokens and loss agree to the last digit."""
    seen: dict[tuple, str] = {}
    lines = []
    for row, name in zip(rows, names):
        key = (row["params"], row["tokens"], row["loss"])
        if key in seen:
            lines.append(f"runs {seen[key]} and {name} have the same params, tokens and loss: one run twice?")
        seen.setdefault(key, name)
    return lines


def table_warnings(table: RunTable) -> list[str]:
    """What stands against fitting these runs by any method: unfinished ones, and likely duplicates."""
    intermediate = [row.get("checkpoint") == "intermediate" for row in table.rows]
    # An intermediate checkpoint has not cooled down either, and is told of once.
    uncooled = [row.get("cooled") is False and not early for row, early in zip(table.rows, intermediate)]
    found = []
    for flags, what in ((intermediate, "are intermediate checkpoints"), (uncooled, "were not cooled down")):
        if any(flags):
            found.append(
                f"{sum(flags)} of {len(table)} runs {what} (the first: {table.select(flags).places[0]}): their losses "
                "lie above those of runs planned to end there; leave them out"
            )
    if unlike := unlike_validation(table.rows, table.places):
        found.append(f"losses of unlike validation sets: {unlike}; the law mixes two scales")
    return found + suspicious_units(table.rows, table.names) + suspected_duplicates(table.rows, table.names)


def write_runs(path: Path | str, rows: list[dict[str, Any]]) -> None:
    """Write rows as `runs.csv`, whole or not at all; known columns first, empty ones only if contractual."""
    used = dict.fromkeys(k for row in rows for k in row if row[k] is not None)
    losses = [c for c in (*LOSS_COLUMNS, *used) if c.startswith("loss_") and c in used]
    extra = [c for c in (*conventions.FACTS, *OWN_COLUMNS) if c in used]
    header = list(dict.fromkeys([*COLUMNS, *losses, *extra, *used]))
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
    # From 2^53 on floats are not exact to one: digits printed as an integer would feign it.
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return repr(float(value)) if isinstance(value, float) else str(value)  # numpy's floats have another repr
