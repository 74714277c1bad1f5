"""A study on disk, read for its report: runs with their logs, the run table and the fitted laws."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from megamm_laws.comparison.recounted import group_column, recount, runs_of
from megamm_laws.fitting.fits_file import read_laws
from megamm_laws.law.fitted import Law
from megamm_laws.runs.conventions import FACTS, MissingFactError
from megamm_laws.runs.readers.run_dirs import folders_set_aside
from megamm_laws.runs.table import RunTable, read_runs

from megamm.errors import InputError
from megamm.files import read_json
from megamm.yaml_text import read_yaml

BLIND = "text"
"""Architecture of the baseline that sees no images."""


@dataclass(kw_only=True)
class TrainedRun:
    """A run directory; ``result`` is None while it is not finished."""

    path: Path
    config: dict[str, Any]
    about: dict[str, Any]
    """run.json"""
    records: list[dict[str, Any]]
    """Training lines of metrics.jsonl, in order."""
    result: dict[str, Any] | None

    @property
    def architecture(self) -> str:
        """As in the run table."""
        model, variant = self.config["model"], self.config["train"].get("variant")
        moe = (model.get("experts") or {}).get("num")
        return str(variant or model["architecture"] + ("-moe" if moe else ""))

    @property
    def width(self) -> int:
        return int(self.config["model"]["width"])

    @property
    def params(self) -> float:
        return float(self.about["params"])

    @property
    def is_trunk(self) -> bool:
        """Trained at a constant rate for others to branch from; its loss is not that of a finished run."""
        return self.config["schedule"]["cooldown"] == "none"

    @property
    def share_trained(self) -> float:
        """Share of its steps that this run trained itself; a branch takes those before from its trunk."""
        if not self.config["train"].get("branch_from"):
            return 1.0
        return float(self.config["schedule"]["cooldown_fraction"])

    @property
    def seconds(self) -> float:
        """Training time, from the median speed of its logged steps."""
        speeds = [r["tokens_per_second"] for r in self.records if r.get("tokens_per_second")]
        return self.records[-1]["tokens"] * self.share_trained / float(np.median(speeds)) if speeds else 0.0


@dataclass(kw_only=True)
class StudyResults:
    """Everything that the report shows.

    Attributes:
        group_column: column of the table whose values are the fits' groups; None where there is one fit of all.
        laws: loss column -> group -> law.
        saving: what shared trunks save, as study.json has it; empty without trunks.
    """

    folder: Path
    name: str
    runs: list[TrainedRun]
    table: RunTable
    group_column: str | None
    fits: list[dict[str, Any]]
    laws: dict[str, dict[str, Law]] = field(default_factory=dict)
    saving: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> list[TrainedRun]:
        return [run for run in self.runs if run.result is not None]

    @property
    def cooled(self) -> list[TrainedRun]:
        """Finished runs, trunks left out."""
        return [run for run in self.finished if not run.is_trunk]

    @property
    def groups(self) -> list[str]:
        """Groups of the fits, the blind baseline last."""
        found = list(dict.fromkeys(fit["group"] for fit in self.fits))
        return sorted(found, key=lambda g: (g == BLIND, found.index(g)))

    @property
    def pair(self) -> tuple[str, str] | None:
        """The two groups that the verdict compares: early and late, or the first two that see images."""
        seeing = [g for g in self.groups if g != BLIND]
        if "early" in seeing and "late" in seeing:
            return "early", "late"
        return (seeing[0], seeing[1]) if len(seeing) > 1 else None

    @cached_property
    def sources(self) -> list[str]:
        """Sources with a validation loss, in the order of the config."""
        return list(dict.fromkeys(s for run in self.finished for s in run.result["losses"]))

    def in_order(self, columns: Iterable[str]) -> list[str]:
        """Loss columns in reading order: the average, then the sources in the order of the config."""
        order = ["loss", *(f"loss_{source}" for source in self.sources)]
        return sorted(columns, key=lambda c: order.index(c) if c in order else len(order))

    @property
    def loss_columns(self) -> list[str]:
        """Fitted loss columns."""
        return self.in_order(self.laws)

    @property
    def flops(self) -> float:
        """FLOPs spent, steps shared through a trunk counted once."""
        return sum(run.records[-1]["flops"] * run.share_trained for run in self.runs if run.records)

    def rows_of(self, group: str) -> RunTable:
        """Rows of the run table that belong to a group."""
        if self.group_column is None:
            return self.table
        return self.table.select(str(row.get(self.group_column)) == group for row in self.table.rows)

    def recounted(self, column: str, counting: str) -> dict[str, Law]:
        """The laws of a loss column with FLOPs counted in another way; groups without the figures left out.

        ``counting`` is a key of recounted.COUNTED. What the run table lacks is taken from the runs' results.
        """
        known = {run.result["name"]: run.result for run in self.cooled}
        changed = {}
        for group, law in self.laws.get(column, {}).items():
            table = runs_of(self.table, self.group_column, group, column)
            for row, name in zip(table.rows, table.names):
                result = known.get(name, {})
                row |= {key: result.get(key) for key in FACTS if row.get(key) is None and result.get(key) is not None}
            with suppress(MissingFactError):
                changed[group] = recount(law, table, counting)[0]
        return changed


def read_results(folder: Path | str) -> StudyResults:
    """Read a study folder with its runs.csv and fits/.

    Raises:
        InputError: no runs, no runs.csv or no fits there, each with the command that makes it; or a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the output folder of tools/run_study.py")
    runs = _read_runs(folder)
    if not any(run.result for run in runs):
        raise InputError(f"{folder}: no finished run (result.json) in it; train with tools/run_study.py --out {folder}")
    table_path, fits_path = folder / "runs.csv", folder / "fits" / "fits.json"
    if not table_path.exists():
        raise InputError(f"{table_path}: not found; run: python tools/collect_runs.py {folder} --out {table_path}")
    if not fits_path.exists():
        raise InputError(
            f"{fits_path}: not found; run: python tools/fit_scaling_laws.py {table_path} --out {folder / 'fits'} "
            "--group-by architecture --losses all"
        )
    table, fits = read_runs(table_path), read_json(fits_path).get("fits")
    if not isinstance(fits, list) or not fits:
        raise InputError(f"{fits_path}: no list of fits; run tools/fit_scaling_laws.py again")
    columns = dict.fromkeys(fit.get("loss_column", "loss") for fit in fits)
    study = read_json(folder / "study.json") if (folder / "study.json").exists() else {}
    made = StudyResults(
        folder=folder,
        name=str(study.get("name") or folder.resolve().name),
        runs=runs,
        table=table,
        group_column=group_column(table, {fit["group"] for fit in fits}),
        fits=fits,
        laws={column: read_laws(fits_path.parent, column) for column in columns},
        saving=study.get("saving") or {},
    )
    # The cost of a model as the runs show it, not one factor for all sizes: as the recounted laws have it.
    made.laws = {column: made.laws[column] | made.recounted(column, "counted") for column in columns}
    return made


def _read_runs(folder: Path) -> list[TrainedRun]:
    found, aside = [], folders_set_aside(folder)
    for place, subfolders, files in os.walk(folder):
        # The order of os.walk is that of the file system.
        subfolders.sort()
        if Path(place).resolve() in aside:
            subfolders.clear()
        elif {"config.yaml", "run.json"} <= set(files):
            # A run holds no other runs.
            subfolders.clear()
            found.append(_read_run(Path(place)))
    return found


def _read_run(path: Path) -> TrainedRun:
    metrics, result = path / "metrics.jsonl", path / "result.json"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    try:
        # A kill can cut the last line short: it has no newline.
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        records = [r for r in records if "loss" in r and "flops" in r]
    except ValueError as error:
        raise InputError(f"{metrics}: not JSON lines ({error}); remove the damaged line") from error
    run = TrainedRun(
        path=path,
        config=read_yaml(path / "config.yaml"),
        about=read_json(path / "run.json"),
        records=records,
        result=read_json(result) if result.exists() else None,
    )
    for file, holder, needed in (
        ("config.yaml", run.config, ("model", "schedule", "train", "data")),
        ("run.json", run.about, ("params",)),
        ("result.json", run.result, ("name", "params", "tokens", "losses")),
    ):
        missing = [key for key in needed if holder is not None and key not in holder]
        if missing:
            raise InputError(f"{path / file}: no field {', '.join(missing)}; it is not as training wrote it")
    return run
