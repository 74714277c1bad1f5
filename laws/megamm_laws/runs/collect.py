"""Collect runs from training logs of several kinds into the rows of one table.

A path is a run directory, a folder that holds run directories, event files or text logs, a log file, or a table.
Which reader takes a file is seen from its content. What the logs do not say (often the number of parameters) comes
from ``facts``, by run name. To read another kind of log, add a function to :data:`READERS`.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megamm_laws.errors import InputError
from megamm_laws.runs import conventions
from megamm_laws.runs.readers.composer import read_composer
from megamm_laws.runs.readers.curve import ROTATED, Curve, curve_rows
from megamm_laws.runs.readers.hf_trainer import read_hf_trainer
from megamm_laws.runs.readers.lingua import read_lingua
from megamm_laws.runs.readers.megatron import read_megatron
from megamm_laws.runs.readers.names import TagMap
from megamm_laws.runs.readers.nanogpt import read_nanogpt
from megamm_laws.runs.readers.nanotron import read_nanotron
from megamm_laws.runs.readers.olmo_core import read_olmo_core
from megamm_laws.runs.readers.parts import join_parts
from megamm_laws.runs.readers.run_dirs import (
    DivergedError,
    folders_set_aside,
    intermediate_rows,
    is_run_dir,
    row_of_result,
)
from megamm_laws.runs.readers.tensorboard_events import MARK, read_events
from megamm_laws.runs.readers.torchtitan import read_torchtitan
from megamm_laws.runs.readers.wandb_export import read_wandb
from megamm_laws.runs.table import (
    check_one_loss,
    csv_records,
    is_number,
    parse_number,
    read_runs,
    unlike_validation,
)

LOG_NAME = re.compile(
    r".+\.(log|out|err|txt|jsonl|ndjson)(\.\d+)?|.+\.csv|.+\.[oe]\d+|(.*[-_.])?(stdout|stderr|log)|trainer_state\.json",
    re.IGNORECASE,
)
"""Names of the files that are tried as logs inside a folder; rotated ones and those of batch systems, too."""
READERS: list[Callable[[Path], list[Curve] | None] | Callable[[Path, dict[str, str]], list[Curve] | None]] = [
    read_events,
    read_lingua,
    read_wandb,
    read_hf_trainer,
    read_megatron,
    read_torchtitan,
    read_nanotron,
    read_olmo_core,
    read_composer,
    read_nanogpt,
]
"""Tried in turn on each file; a reader returns None for a file that is not of its kind."""
MAPPED = (read_events, read_wandb)
"""Readers of free tags, which take a mapping; the others read lines that the trainer words itself."""
SHOWN = 3
"""Reasons named where nothing is left."""
LOSSES = ("auto", "validation", "training")


@dataclass(kw_only=True)
class CollectOptions:
    """What to take from the logs.

    Attributes:
        loss: final loss to take from logs: one of LOSSES.
        include_uncooled: take in runs that were not cooled down, trunks among them.
        include_intermediate: take in checkpoints before the end of a run, also of unfinished ones.
        convention: name in conventions.CONVENTIONS to count all rows by; None leaves each as its source counted it.
        mapping: tag of a log -> our name, over the usual names.
        facts: run name -> columns that hold for the run; those under ``*`` hold for all.
        allow_unlike: take in losses that were measured on unlike validation sets.
    """

    loss: str = "auto"
    include_uncooled: bool = False
    include_intermediate: bool = False
    convention: str | None = None
    mapping: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    allow_unlike: bool = False

    def facts_of(self, run: str) -> dict[str, Any]:
        """Columns given by hand for a run."""
        return {**self.facts.get("*", {}), **self.facts.get(run, {})}


@dataclass(kw_only=True)
class Collected:
    """What one PATH held: rows, where each came from, and lines on what was left out."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    keys: list[tuple] = field(default_factory=list)
    """What tells a row from all others: one that is reached by two of the paths has the same key."""
    left_out: list[str] = field(default_factory=list)

    def add(self, row: dict[str, Any], origin: str, identity: str = "") -> None:
        self.rows.append(row)
        self.origins.append(origin)
        # Two exports may name a run in two ways; its id is one.
        self.keys.append((identity, row.get("checkpoint"), row["tokens"]) if identity else (origin, row["run"]))


def collect(
    paths: Iterable[Path | str],
    options: CollectOptions | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all ``paths`` and lines on what was left out.

    A run reached twice counts once. Trunks (constant learning rate, never cooled down) and intermediate checkpoints
    are left out unless the options take them in: their loss is not that of a finished run.

    Raises:
        InputError: a path of no known kind, a bad value, one name for two runs, two conventions or two kinds of
            loss, a tag of the mapping that no log has, or nothing found.
    """
    options = options or CollectOptions()
    mapping = TagMap(options.mapping)
    options = replace(options, mapping=mapping)
    if options.loss not in LOSSES:
        raise InputError(f"--loss: {options.loss!r} is unknown; known: {', '.join(LOSSES)}")
    # Gone through twice: read, and named in the message.
    paths = list(paths)
    rows, places, left_out = _gather(map(Path, paths), options, progress)
    if not rows:
        reasons = "; ".join(left_out[:SHOWN]) + (f"; and {len(left_out) - SHOWN} more" if left_out[SHOWN:] else "")
        why = f"; left out {len(left_out)}: {reasons}" if left_out else ""
        raise InputError(f"no finished run in {', '.join(map(str, paths))}{why}")
    # After all logs are read: any one of them may have the tag.
    if unused := set(mapping) - mapping.used:
        raise InputError(f"--map: no log has the tag {', '.join(sorted(unused))}; correct or remove it")
    left_out += _facts_of_no_run(options, rows)
    rows = _count(rows, places, options)
    check_one_loss(rows, places)
    if not options.allow_unlike and (unlike := unlike_validation(rows, places)):
        raise InputError(f"{unlike}: losses on unlike validation sets; leave one out, or take both with --allow")
    return rows, left_out


def _gather(
    paths: Iterable[Path], options: CollectOptions, progress: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """The rows that the options take in, the place of each, and lines on the rest, whole runs first."""
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    excluded: list[str] = []
    left_out: list[str] = []
    seen: set[tuple] = set()
    named: dict[tuple, str] = {}
    for path in paths:
        found = _read(path, options, progress)
        left_out += found.left_out
        for row, origin, key in zip(found.rows, found.origins, found.keys):
            if key in seen:
                continue
            seen.add(key)
            reason = _excluded(row, options)
            if reason:
                excluded.append(f"{origin}: {reason}")
                continue
            name = (row["run"], row.get("architecture"), row.get("mixture"))
            if name in named:
                raise InputError(f"{origin}: run {row['run']} is also in {named[name]}; rename or remove one")
            named[name] = origin
            rows.append(row)
            places.append(f"{origin}: run {row['run']}")
    return rows, places, list(dict.fromkeys(excluded + left_out))


def _excluded(row: dict[str, Any], options: CollectOptions) -> str | None:
    """Why a row is left out; None if it is not."""
    if row.get("checkpoint") == "intermediate":
        return None if options.include_intermediate else "intermediate checkpoint; --include-intermediate takes it in"
    if row.get("cooled") is False and not options.include_uncooled:
        return "not cooled down (a trunk, or a rate that never fell); --include-uncooled takes it in"
    return None


# -------------------------------------------------------------------------------------------------- reading


def _read(path: Path, options: CollectOptions, progress: Callable[[str], None]) -> Collected:
    if not path.exists():
        raise InputError(f"{path}: does not exist; give run directories, logs or CSV files")
    if path.is_dir():
        return _read_folder(path, options, progress)
    progress(f"reading {path}")
    found = Collected()
    curves = _curves(path, options)
    # Only now: exports of W&B are CSV files, too, and no reader takes a runs.csv for one.
    if curves is None and path.suffix.lower() == ".csv":
        return _read_table(path, options)
    if curves is None:
        what = "not a kind of log that is known" if path.stat().st_size else "empty"
        raise InputError(
            f"{path}: {what}; give run directories, TensorBoard event files, output of Megatron-LM, torchtitan, "
            "nanotron, OLMo-core, Composer or nanoGPT, "
            "metrics.jsonl of lingua, trainer_state.json, exports of W&B or a runs.csv"
        )
    _add_curves(found, curves, options)
    return found


def _read_folder(root: Path, options: CollectOptions, progress: Callable[[str], None]) -> Collected:
    """Everything at or below a folder; inside one of our run directories nothing further is looked for."""
    found = Collected()
    curves: list[Curve] = []
    others: list[Path] = []
    aside = folders_set_aside(root)
    for place, subfolders, files in os.walk(root):
        subfolders.sort(key=_in_order)  # the order of the file system would be the order of the table
        folder = Path(place)
        progress(f"reading {folder}")
        # A folder whose own path is given is wanted, whatever its study says.
        if aside and folder != root and (reason := aside.get(folder.resolve())):
            subfolders.clear()
            found.left_out.append(f"{folder}: set aside by its study: {reason}")
        elif is_run_dir(folder, files):
            subfolders.clear()
            if "result.json" in files:
                _add_run_directory(found, folder, root, options)
            else:
                found.left_out.append(f"{folder}: unfinished (config.yaml but no result.json)")
        else:
            # Every start of a run may have a folder of its own; they come sorted, and are named by their time.
            logs = [folder] if any(MARK in name for name in files) else []
            # Older parts of a rotated log first.
            names = sorted((name for name in files if MARK not in name and LOG_NAME.fullmatch(name)), key=_oldest_first)
            logs += [folder / name for name in names]
            others += [folder / name for name in sorted(files) if MARK not in name and not LOG_NAME.fullmatch(name)]
            for log in logs:
                curves += _curves_below(log, found, options, progress)
    _add_curves(found, curves, options)
    if others:
        found.left_out.append(_not_looked_at(root, others))
    if not found.rows and not found.left_out:
        raise InputError(f"{root}: no run at or below it: no folder with result.json, no event files, no log")
    return found


def _curves_below(log: Path, found: Collected, options: CollectOptions, progress: Callable[[str], None]) -> list[Curve]:
    """The parts of runs in a log that was come upon; a line where it cannot be read, as others may be."""
    progress(f"reading {log}")
    try:
        curves = _curves(log, options)
    except InputError as error:
        found.left_out.append(str(error))
        return []
    if curves is None and not log.stat().st_size:
        found.left_out.append(f"{log}: empty")
    elif curves is None:  # a table may hold the very runs beside it
        table = "; a table is read where its own path is given" if log.suffix.lower() == ".csv" else ""
        found.left_out.append(f"{log}: not a kind of log that is known{table}")
    for curve in curves or []:
        curve.unit = curve.unit or log.parent
    return curves or []


def _in_order(name: str) -> list[tuple[int, str]]:
    """Key that sorts checkpoint-9 before checkpoint-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _oldest_first(name: str) -> tuple[str, int]:
    whole = ROTATED.fullmatch(name)
    return (whole[1], -int(name.rpartition(".")[2])) if whole else (name, 0)


def _not_looked_at(root: Path, files: list[Path]) -> str:
    endings = Counter(file.suffix or file.name for file in files).most_common()
    shown = ", ".join(f"{number} {ending}" for ending, number in endings[:SHOWN])
    more = f" and {len(endings) - SHOWN} other endings" if endings[SHOWN:] else ""
    return f"{root}: {len(files)} files not looked at, by their names no logs: {shown}{more} (the first: {files[0]})"


def _add_run_directory(found: Collected, folder: Path, root: Path, options: CollectOptions) -> None:
    try:
        row = row_of_result(folder, root)
    except DivergedError as error:
        found.left_out.append(str(error))
        return
    # Before the intermediate rows, which are copies of this one.
    row |= options.facts_of(row["run"])
    origin = str(folder.resolve())
    if options.include_intermediate:
        for early in intermediate_rows(folder, row):
            found.add(early, origin)
    found.add(row, origin)


def _curves(path: Path, options: CollectOptions) -> list[Curve] | None:
    """The parts of runs in a file or a folder of events, as its reader gives them; None where none knows it."""
    for reader in READERS:
        if path.is_dir() and reader is not read_events:
            continue
        curves = reader(path, options.mapping) if reader in MAPPED else reader(path)  # type: ignore[call-arg]
        # An empty list is an answer, too: a file of that kind without a run.
        if curves is not None:
            for curve in curves:
                curve.kind = reader.__name__
            return curves
    return None


def _add_curves(found: Collected, curves: list[Curve], options: CollectOptions) -> None:
    for curve in join_parts(curves):
        curve.facts |= options.facts_of(curve.name)
        rows, left_out = curve_rows(curve, loss=options.loss, intermediate=options.include_intermediate)
        found.left_out += left_out
        for row in rows:
            found.add(row, curve.origin, curve.identity)


def _read_table(path: Path, options: CollectOptions) -> Collected:
    """A file already in the form of `runs.csv`."""
    table = read_runs(path, comparable=False)  # rows can still be converted, or left out
    found, origin = Collected(), path.resolve()
    for row, line in zip(table.rows, table.lines):
        name = row.get("run") or f"{path.stem}-{line}"
        kept = {k: None if v == "" else v for k, v in row.items()}
        # Facts last: given by hand, they correct what the table says.
        found.add({**kept, "run": name, **options.facts_of(name)}, f"{origin} line {line}")
    return found


# ------------------------------------------------------------------------------------- checks over all rows


def _count(rows: list[dict[str, Any]], places: list[str], options: CollectOptions) -> list[dict[str, Any]]:
    """The rows under one convention."""
    if options.convention:
        return conventions.convert_rows(rows, places, options.convention)
    labelled = []
    for row, place in zip(rows, places):
        try:
            labelled.append(conventions.label(row))
        except conventions.MissingFactError as error:
            raise InputError(f"{place}: column {error} is missing to count FLOPs; give it with --facts") from error
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
    conventions.check_one_convention(labelled, places)
    return labelled


def _facts_of_no_run(options: CollectOptions, rows: list[dict[str, Any]]) -> list[str]:
    """A line on each run of the facts that was not found, as it may be misspelt; InputError where none was."""
    # Intermediate checkpoints are named RUN@STEP, and facts hold for RUN.
    names = {str(row["run"]).partition("@")[0] for row in rows} | {str(row["run"]) for row in rows}
    given = [name for name in options.facts if name != "*"]
    if given and not names & set(given):
        known = ", ".join(sorted(names)[:5])
        raise InputError(f"--facts: column run: none of these runs was found: {', '.join(given[:5])}; found {known}")
    return [f"facts of run {name}: no run of that name was taken in" for name in given if name not in names]


def read_facts(path: Path | str) -> dict[str, dict[str, Any]]:
    """Columns by run from a CSV file with a column ``run``.

    Raises:
        InputError: unreadable, no column ``run``, a run twice, a bad number or number of cells; names the line.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if "run" not in (reader.fieldnames or []):
                raise InputError(f"{path}: line 1: no column run; has {', '.join(reader.fieldnames or [])}")
            found: dict[str, dict[str, Any]] = {}
            for line, row in csv_records(path, reader):
                name = row.pop("run")
                if name in found:
                    raise InputError(f"{path}: line {line}: run {name} twice")
                found[name] = parse_facts(row, f"{path}: line {line} (run {name})")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; give a CSV file with a column run") from error
    except csv.Error as error:
        raise InputError(f"{path}: not valid CSV ({error})") from error
    return found


def parse_facts(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Values given by hand: numbers where the column holds numbers, text elsewhere; empty ones left out."""
    return {
        column: parse_number(where, column, value) if is_number(column) or column == "tokens_per_step" else value
        for column, value in row.items()
        if column and value not in (None, "")
    }
