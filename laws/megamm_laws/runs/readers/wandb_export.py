"""Exports of Weights & Biases, told apart by their first line.

* the runs table as CSV: a row per run with ``Name``, ``State`` and the chosen columns of config and summary;
* a chart as CSV: ``Step`` and a column ``RUN - METRIC`` per run (its ``__MIN`` and ``__MAX`` are not read);
* the history of one run (``run.history()`` or ``run.scan_history()``) as CSV or JSON lines with ``_step``;
* runs as JSON lines with ``config`` and ``summary`` (``run.config``, ``run.summary`` of the public API).

A summary holds the last value of each metric, so that a run whose state is not ``finished`` counts as unfinished.
Whether a run was cooled down shows only where both its planned learning rate and its last one were exported.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamm_laws.errors import InputError
from megamm_laws.runs.readers.curve import Curve, run_name
from megamm_laws.runs.readers.names import flatten, key_of_tag, number, whole_number
from megamm_laws.runs.table import csv_records, parse_record

TEXTS = ("run", "id", "state", "architecture", "mixture")
CURVES = ("train_loss", "tokens", "lr", "flops", "flops_exact")
"""Keys whose values belong to a step; with every validation loss."""


def read_wandb(path: Path, mapping: dict[str, str] | None = None) -> list[Curve] | None:
    """The runs in an export; None if the file is none of them.

    Raises:
        InputError: a line that is damaged, or an export without a value that means anything here.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        records = list(_json_lines(path))
        if not records:
            return None
        if any("summary" in record or "summary_metrics" in record for _, record in records):
            return _runs(path, [(line, _opened(r, f"{path}: line {line}")) for line, r in records], mapping)
        if any("_step" in record or "step" in record for _, record in records):
            return _histories(path, records, mapping)
        return None
    if path.suffix.lower() != ".csv":
        return None
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or [])
        # In this order: a table of runs may have a column _step, too.
        if "Name" in header and "State" in header:
            return _runs(path, csv_records(path, reader), mapping)
        if "_step" in header:
            return _histories(path, csv_records(path, reader), mapping)
        if header and any(" - " in column for column in header[1:]):
            if repeated := [column for column, number in Counter(header).items() if number > 1]:
                raise InputError(
                    f"{path}: line 1: column {repeated[0]} appears twice: two runs of one name; export the chart "
                    "grouped by run id, or the runs one by one"
                )
            return _chart(path, header, csv_records(path, reader), mapping)
    return None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for i, line in enumerate(lines, start=1):
            if line.strip():
                yield i, parse_record(f"{path}: line {i}", line)


def _opened(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A run's record with config and summary as mappings: some exports store them as JSON text."""
    opened = {}
    for key, value in record.items():
        key = {"summary_metrics": "summary"}.get(key, key)
        if key in ("config", "summary") and isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise InputError(f"{where}: {key} is text that is not JSON ({error})") from error
        opened[key] = value
    return flatten(opened)


def _runs(path: Path, records: list[tuple[int, dict[str, Any]]], mapping: dict[str, str] | None) -> list[Curve]:
    """A run per record, with one point: its end."""
    curves = []
    for line, record in records:
        facts: dict[str, Any] = {}
        point: dict[str, float] = {}
        planned: dict[str, float] = {}  # by the config
        for tag, value in sorted(record.items(), key=lambda item: _of_config(item[0])):  # what happened comes first
            key = key_of_tag(tag, mapping)
            if key is None or value in (None, ""):
                continue
            if key in TEXTS:
                facts.setdefault(key, str(value))
            elif (parsed := number(value)) is None:
                raise InputError(f"{path}: line {line}: column {tag}: {value!r} is not a number")
            elif key.startswith("loss") or key in CURVES or key == "step":
                # The rate of the config is the peak, not that of the last step.
                (planned if key == "lr" and _is_planned(tag) else point).setdefault(key, parsed)
            else:
                facts.setdefault(key, parsed)
        name, state = facts.pop("run", f"{path.stem}-{line}"), facts.pop("state", "finished")
        identity = str(facts.pop("id", "") or "")
        total = whole_number(facts.pop("total_steps", None)) or None
        # Any step will do where none is told: a summary is one point, the end.
        step = whole_number(point.pop("step", None)) or total or 1
        curve = Curve(name=name, origin=f"{path} line {line}", facts=facts, total_steps=total, identity=identity)
        # A script may end well before the steps that were planned.
        curve.finished = str(state).lower() == "finished" and (not total or step >= total)
        if planned and "lr" in point:
            curve.add(0, planned)
        else:
            point.pop("lr", None)  # one rate alone says nothing of a fall
        curve.add(step, point)
        curves.append(curve)
    _tell_apart(curves)
    return curves


def _tell_apart(curves: list[Curve]) -> None:
    """Names of runs that share one, with their ids."""
    counts = Counter(curve.name for curve in curves)
    for curve in curves:
        if counts[curve.name] > 1 and curve.identity:
            curve.name = f"{curve.name}-{curve.identity}"


def _of_config(tag: str) -> bool:
    return tag.lower().startswith("config/")


def _is_planned(tag: str) -> bool:
    """Whether a learning rate is a setting: in a runs table, logged metrics have a section and settings none."""
    return _of_config(tag) or "/" not in tag


def _histories(path: Path, records: list[tuple[int, dict[str, Any]]], mapping: dict[str, str] | None) -> list[Curve]:
    """A run per id or name that the records hold; a new part where the steps begin anew."""
    found: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for line, record in records:
        said = {
            key_of_tag(tag, mapping): value for tag, value in record.items() if isinstance(value, str) and tag != "name"
        }
        found.setdefault((str(said.get("run") or ""), str(said.get("id") or "")), []).append((line, record))
    curves = []
    for (name, identity), own in found.items():
        for part in _parts(own):
            curve = _history(path, part, mapping)
            curve.name, curve.identity = name or identity or curve.name, identity
            curves.append(curve)
    if len({curve.identity for curve in curves}) > 1:
        for curve in curves:
            sharing = {other.identity for other in curves if other.name == curve.name}
            if len(sharing) > 1:
                curve.name = f"{curve.name}-{curve.identity}"
    return curves


def _parts(records: list[tuple[int, dict[str, Any]]]) -> list[list[tuple[int, dict[str, Any]]]]:
    """The records cut where the step falls back to the first one or below it."""
    parts: list[list[tuple[int, dict[str, Any]]]] = [[]]
    first = last = float("-inf")  # of the part
    for line, record in records:
        step = number(record.get("_step", record.get("step")))
        if step is not None:
            if last > first >= step:
                parts.append([])
                first = float("-inf")
            first, last = (step if first == float("-inf") else first), step
        parts[-1].append((line, record))
    return parts


def _history(path: Path, records: list[tuple[int, dict[str, Any]]], mapping: dict[str, str] | None) -> Curve:
    """One run; a metric that was not logged at a step is empty there."""
    curve = Curve(name=run_name(path), origin=str(path))
    for line, record in records:
        values: dict[str, float] = {}
        step = None
        for tag, value in flatten(record).items():
            key = key_of_tag(tag, mapping)
            if key is None or key in TEXTS or value in (None, ""):
                continue
            if (parsed := number(value)) is None:
                raise InputError(f"{path}: line {line}: column {tag}: {value!r} is not a number")
            # A history in CSV holds nan where a metric was not logged.
            if key == "step":
                # A trainer's own counter may be logged beside _step, under which W&B files the row.
                step = whole_number(parsed) if step is None or tag == "_step" else step
            # In JSON lines a NaN was logged as one, and is refused later.
            elif parsed == parsed or path.suffix.lower() != ".csv":
                values[key] = parsed
        if step is None:
            raise InputError(f"{path}: line {line}: no _step")
        facts = {k: v for k, v in values.items() if not (k.startswith("loss") or k in CURVES)}
        curve.facts |= facts
        curve.add(step, {k: v for k, v in values.items() if k not in facts})
    if not any(curve.points.values()):
        raise InputError(f"{path}: no column of a usual name; name them with --map loss=COLUMN, tokens=COLUMN")
    curve.total_steps = whole_number(curve.facts.pop("total_steps", None)) or None
    return curve


def _chart(
    path: Path, header: list[str], records: list[tuple[int, dict[str, Any]]], mapping: dict[str, str] | None
) -> list[Curve]:
    """A run per column; the first column holds steps, or whatever the axis showed."""
    curves: dict[str, Curve] = {}
    axis = "tokens" if key_of_tag(header[0], mapping) == "tokens" else "step"
    for column in header[1:]:
        # From the right: names of runs may hold the separator.
        name, _, metric = column.rpartition(" - ")
        key = key_of_tag(metric, mapping)
        if key is None or not name or metric.endswith(("__MIN", "__MAX")):
            continue
        curve = curves.setdefault(name, Curve(name=name, origin=f"{path} column {column}"))
        for line, record in records:
            if record[column] in (None, ""):
                continue
            at, value = whole_number(number(record[header[0]])), number(record[column])
            if at is None or value is None:
                bad = header[0] if at is None else column
                raise InputError(f"{path}: line {line}: column {bad}: {record[bad]!r} is not a number")
            curve.add(at, {key: value} | ({"tokens": float(at)} if axis == "tokens" else {}))
    if not curves:
        raise InputError(f"{path}: no column RUN - METRIC of a usual metric; name it with --map loss=METRIC")
    return list(curves.values())
