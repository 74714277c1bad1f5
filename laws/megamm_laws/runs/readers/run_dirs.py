"""Our own run directories: result.json of finished runs, metrics.jsonl for intermediate checkpoints."""

import hashlib
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from megamm_laws.errors import InputError
from megamm_laws.files import read_json
from megamm_laws.runs.table import COLUMNS, LOSS_COLUMNS, REQUIRED, is_number, parse_number, parse_record

COPIED = ("params_vision", "tokens_vision", "flops_exact", "init", "lr", "batch_tokens", "sweep")
"""Columns of the table, beside those of `runs.csv`, that result.json holds."""
STUDY_DEPTH = 4
"""Folders looked into for study.json, upwards: a run directory, its ladder, runs/, the study."""
_MODEL = re.compile(r"^model:\n((?:[ #].*\n|\n)*)", re.MULTILINE)
_SIZES = re.compile(r"^  (vocab_size|width|tied_embeddings): (\d+|true|false)$", re.MULTILINE)


class DivergedError(Exception):
    """A run without a result; the message says where and why."""


def is_run_dir(folder: Path, files: Collection[str]) -> bool:
    """Whether a folder that holds ``files`` is a run directory: by what they are, as others write these names, too."""
    if "result.json" not in files:
        return "run.json" in files and "config.yaml" in files
    if "config.yaml" in files or "run.json" in files:
        return True
    try:
        return {"name", *REQUIRED} <= set(read_json(folder / "result.json"))
    except InputError:
        return False


def row_of_result(run_dir: Path, root: Path) -> dict[str, Any]:
    """The row of a finished run; ``trunk`` is given from the name of ``root`` on where it lies below.

    Raises:
        InputError: result.json is not valid or lacks a field.
        DivergedError: its loss is not finite.
    """
    path = run_dir / "result.json"
    result = read_json(path)
    loss = result.get("loss")
    if isinstance(loss, float) and not math.isfinite(loss):
        raise DivergedError(f"{path}: diverged: column loss: {loss}")
    missing = [key for key in ("name", *REQUIRED) if result.get(key) is None]
    if missing:
        raise InputError(f"{path}: no field {', '.join(missing)}; run the training again or move the folder away")
    row = {column: result.get(column) for column in (*COLUMNS, *COPIED) if column != "run"}
    row |= {"run": str(result["name"]), **_source_losses(path, result.get("losses") or {})}
    branch = result.get("branch_from")
    if branch is not None and not isinstance(branch, str):
        raise InputError(f"{path}: branch_from: {branch!r} is not the folder of a trunk; run the training again")
    cooled = bool(result.get("cooled", not result.get("trunk", False)))
    # What did not cool down is itself a trunk, and its branches name its folder: all of them are one unit.
    trunk = Path(branch) if branch else None if cooled else run_dir
    row |= {"trunk": _relative(trunk, root) if trunk else None, "cooled": cooled}
    row |= {"checkpoint": "final", "measured_on": "validation", **_vocabulary(run_dir)}
    row["validation_set"] = _validation_set(result.get("fingerprints"))
    where = str(path)
    for column in filter(is_number, list(row)):
        row[column] = parse_number(where, column, row[column])
    if row["flops"] is not None:  # ours are the paper's
        row["flops_convention"] = "paper"
    return row


def folders_set_aside(folder: Path) -> dict[Path, str]:
    """Run directories that a study no longer counts, each resolved, with the reason; from the study.json at or above.

    Raises:
        InputError: study.json is not valid.
    """
    for place in [folder, *folder.resolve().parents][:STUDY_DEPTH]:
        if (path := place / "study.json").is_file():
            entries = read_json(path).get("set_aside") or []
            try:
                return {(place / entry["dir"]).resolve(): str(entry["reason"]) for entry in entries}
            except (KeyError, TypeError) as error:
                raise InputError(
                    f"{path}: set_aside: expected entries with dir and reason; run the study again"
                ) from error
    return {}


def intermediate_rows(run_dir: Path, final: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per validation before the last one, from metrics.jsonl; the rest is as in the ``final`` row.

    A validation at a step stands after the training line of the same step, which holds the FLOPs.

    Raises:
        InputError: a line that is damaged, lacks its step or tokens, or holds a bad number.
    """
    rows: list[dict[str, Any]] = []
    flops: dict[str, Any] = {}
    for where, record in _metrics(run_dir / "metrics.jsonl"):
        if "flops" in record:
            flops = {key: record[key] for key in ("flops", "flops_exact") if key in record}
        losses = {
            f"loss_{key.split('/')[1]}": value
            for key, value in record.items()
            # val/SOURCE/loss alone: a source has other values beside its loss.
            if key.startswith("val/") and key.endswith("/loss") and key.count("/") == 2 and value is not None
        }
        if not losses or record.get("tokens") == 0:  # before training there is nothing to fit
            continue
        missing = [key for key in ("step", "tokens") if record.get(key) is None]
        if missing:
            raise InputError(f"{where}: no field {', '.join(missing)}; remove the damaged line")
        logged = {"tokens": record["tokens"], **flops, **losses}
        seen = {column: parse_number(where, column, value) for column, value in logged.items()}
        # The validation at the end is the final row itself.
        if seen["tokens"] < final["tokens"]:
            losses = {column: seen[column] for column in losses}
            seen["loss"] = sum(losses.values()) / len(losses)
            share = seen["tokens"] / final["tokens"]
            seen["tokens_vision"] = (final.get("tokens_vision") or 0) * share or None
            state = {"checkpoint": "intermediate", "cooled": False, "trunk": final["trunk"] or final["run"]}
            rows.append({**final, "run": f"{final['run']}@{record['step']}", **seen, **state})
    return rows


def _metrics(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a metrics.jsonl, with the place of it; none where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):  # cut short by a kill
            continue
        where = f"{path}: line {number}"
        yield where, parse_record(where, line)


def _vocabulary(run_dir: Path) -> dict[str, float]:
    """Parameters of the vocabulary tables, two or a tied one, from config.yaml."""
    try:
        text = (run_dir / "config.yaml").read_text(encoding="utf-8")
        # As the trainer writes it. A parser of YAML would take most of the time of a collection of thousands of runs.
        section = _MODEL.search(text)
        found = dict(_SIZES.findall(section[1])) if section else {}
        if not {"vocab_size", "width"} <= set(found):
            found = (yaml.safe_load(text) or {}).get("model") or {}
        table = float(found["vocab_size"]) * float(found["width"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return {}  # conventions without the tables then say that they are missing
    tied = str(found.get("tied_embeddings")).lower() == "true"
    return {"params_embedding": table if tied else 2 * table, "params_head": table}


def _validation_set(fingerprints: Any) -> str | None:
    """``SOURCE:DIGEST`` for each source, of what its validation rows hold; None where the run does not say."""
    if not isinstance(fingerprints, dict):
        return None
    parts = []
    for source, found in sorted(fingerprints.items()):
        if isinstance(found, dict) and found.get("val"):
            content = "".join(str(found.get(key)) for key in ("val", "tokenizer", "preprocessing"))
            parts.append(f"{source}:{hashlib.sha256(content.encode()).hexdigest()[:12]}")
    return " ".join(parts) or None


def _source_losses(path: Path, losses: Any) -> dict[str, float]:
    """``loss_<source>``, or ``loss_<kind>`` where the kind is a standard column and the name is not."""
    if not isinstance(losses, dict):
        raise InputError(f"{path}: losses: expected a mapping of sources, found {losses!r}; run the training again")
    by_column: dict[str, list[float]] = {}
    for source, entry in losses.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("loss"), int | float):
            raise InputError(f"{path}: losses.{source}: expected a mapping with a number 'loss'")
        column = f"loss_{source}"
        if column not in LOSS_COLUMNS and f"loss_{entry.get('kind')}" in LOSS_COLUMNS:
            column = f"loss_{entry['kind']}"
        # Several sources of a kind share its column, by their mean.
        by_column.setdefault(column, []).append(float(entry["loss"]))
    return {column: sum(values) / len(values) for column, values in by_column.items()}


def _relative(folder: Path, root: Path) -> str:
    try:
        return str(folder.resolve().relative_to(root.resolve().parent))
    except ValueError:
        return str(folder)
