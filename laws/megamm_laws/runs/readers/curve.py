"""The log of one run as a curve over steps, and the rows of a run table that it gives.

A reader names values by these keys: ``loss`` and ``loss_<source>`` (validation, nats), ``train_loss`` (nats),
``tokens`` (seen so far), ``lr``, ``flops`` and ``flops_exact`` (spent so far).

The final loss is the validation loss at the end. A log without any validation gives the mean training loss over
the last 2% of its steps instead; the column ``measured_on`` says which of the two a row holds. Validations before the
end are intermediate checkpoints: their learning rate has not come down yet, so that their losses lie above those of
runs that were planned to end there (Hoffmann et al. 2022, appendix B).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.runs.table import is_number, parse_number

AVERAGED = 0.02
"""Share of the steps at the end over which a training loss is averaged."""
COOLED = 0.2
"""A learning rate at or below this share of its peak counts as cooled down."""
AT_END = 0.99
"""A validation from this share of the steps on is the final one."""
RATES = ("tokens_per_step", "flops_exact_per_token")
"""Facts of a curve that are not columns themselves."""
DIVERGED = 2.0
"""A run whose last loss is this many times its lowest has diverged."""
GENERIC = re.compile(
    r"metrics|history|logs?|train|job|console|stdout|stderr|out|err|output|tensorboard|tb|events|(logs?-)?rank_?\d+|"
    r"trainer_state|checkpoint-\d+|lightning_logs|version_\d+|\d{8}[-_]\d{4,6}",
    re.IGNORECASE,
)
"""Names of files and folders that say nothing of the run in them; the last is the time of a start."""
ROTATED = re.compile(r"(.+\.(?:log|out|err|txt|jsonl|ndjson))\.\d+", re.IGNORECASE)
"""Older parts of a log: `train.log.1` was written before `train.log`."""


def run_name(path: Path) -> str:
    """Name of the run that a file or folder holds: its own without the ending, or that of a folder above it."""
    whole = ROTATED.fullmatch(path.name)
    own = Path(whole[1]).stem if whole else path.stem if path.suffix and not path.is_dir() else path.name
    parts = [own, *(p.name for p in path.resolve().parents)]
    return next((part for part in parts if part and not GENERIC.fullmatch(part)), path.name)


@dataclass(kw_only=True)
class Curve:
    """What the log of one run says."""

    name: str
    origin: str
    """File or folder, for messages."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Columns of the run table that hold for the whole run, and RATES."""
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> values; a step that is logged again (a resumed run) overwrites the old values."""
    total_steps: int | None = None
    """Steps that the run was meant to take, where the log says so."""
    cooled: bool | None = None
    """Whether the learning rate is down at ``total_steps``, where the log names the schedule but not the rate."""
    finished: bool | None = None
    """What the log says of it; None to go by ``total_steps``."""
    missing: str = ""
    """Why a fact could not be read, for the message that asks for it."""
    settings: dict[str, str] = field(default_factory=dict)
    """What the head of the log says beside facts and tells one run from another: learning rate, seed, data, ..."""
    headed: bool = True
    """Whether the log begins with the head of a run; one without goes on from another log."""
    unit: Path | None = None
    """Folder below which logs of the same name may be parts of one run; None for the file alone."""
    kind: str = ""
    """The reader."""
    identity: str = ""
    """What the source itself tells the run by (W&B's id): a run met twice counts once."""

    def add(self, step: int, values: dict[str, float]) -> None:
        """Values at a step; known ones are overwritten."""
        self.points.setdefault(step, {}).update(values)

    def merge(self, later: "Curve") -> None:
        """Take in the log of a restart of the same run."""
        for step, values in later.points.items():
            self.add(step, values)
        self.facts |= later.facts
        self.settings |= later.settings
        self.headed |= later.headed
        self.missing = "" if "params" in self.facts else later.missing or self.missing
        self.total_steps = later.total_steps or self.total_steps
        self.cooled = self.cooled if later.cooled is None else later.cooled
        self.finished = self.finished if later.finished is None else later.finished

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a key, by step: two float64 arrays."""
        pairs = sorted((step, values[key]) for step, values in self.points.items() if key in values)
        return np.array([s for s, _ in pairs], float), np.array([v for _, v in pairs], float)

    @property
    def first_step(self) -> int:
        return min(self.points)

    @property
    def last_step(self) -> int:
        return max(self.points)

    @property
    def is_finished(self) -> bool:
        if self.finished is not None:
            return self.finished
        return self.total_steps is None or self.last_step >= self.total_steps


def losses_of(values: dict[str, float]) -> dict[str, float]:
    """Validation losses at a point; ``loss`` is the mean over sources where only those were logged."""
    found = {k: v for k, v in values.items() if k == "loss" or k.startswith("loss_")}
    if found and "loss" not in found:
        found["loss"] = sum(found.values()) / len(found)
    return found


def validation_steps(curve: Curve) -> list[int]:
    """Steps with a validation loss, in order."""
    return sorted(step for step, values in curve.points.items() if losses_of(values))


def divergence(curve: Curve, loss: str = "auto") -> str:
    """Why the end of a run is no result, empty where it is one; ``loss`` is as in :func:`curve_rows`."""
    steps = validation_steps(curve) if loss in ("auto", "validation") else []
    if steps:
        kind, values = "validation", [losses_of(curve.points[step])["loss"] for step in steps]
    else:
        kind, values = "training", curve.series("train_loss")[1].tolist()
    if not values:
        return ""
    last = values[-1]
    if not np.isfinite(last):
        return f"diverged: its last {kind} loss is {last}"
    lowest = min(value for value in values if np.isfinite(value))
    # Not of negative ones: they are no losses, and are refused as such.
    if last > DIVERGED * lowest > 0:
        return f"diverged: its last {kind} loss is {last:.4g}, after {lowest:.4g} before"
    return ""


def curve_rows(
    curve: Curve, *, loss: str = "auto", intermediate: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the run table, and lines on what was left out.

    Args:
        loss: ``validation``, ``training``, or ``auto`` for validation where the log has any.
        intermediate: also give a row per validation before the end, named RUN@STEP, and the last point of an
            unfinished run; they share their ``trunk`` with the final row, so that a bootstrap keeps them together.

    A run that diverged, or whose log holds no step, gives no row but a line.

    Raises:
        InputError: a count that is not finite, or no value for a required column.
    """
    if not curve.points:
        return [], [f"{curve.origin}: run {curve.name}: no step in it"]
    if reason := divergence(curve, loss):
        return [], [f"{curve.origin}: run {curve.name}: {reason}"]
    steps = validation_steps(curve) if loss in ("auto", "validation") else []
    if loss == "validation" and not steps:
        raise InputError(f"{curve.origin}: run {curve.name}: no validation loss in the log; --loss training takes it")
    end = curve.last_step
    if steps:
        # Before the first step there is nothing to fit.
        kept = [s for s in steps if s > 0]
        # Within 1% of the end: many trainers validate every so many steps, and not once more at the last.
        final = [s for s in kept if s >= AT_END * end][-1:] if curve.is_finished else []
        early = [s for s in kept if s not in final]
    else:
        # Training losses are noise from step to step: points before the end are worth no row each.
        final, early = ([end], []) if curve.is_finished else ([], [end])
    rows = [_row(curve, step, "final", bool(steps)) for step in final]
    left_out = []
    if not final:
        left_out.append(_why_unfinished(curve, bool(steps)))
    if intermediate:
        rows = [_row(curve, step, "intermediate", bool(steps)) for step in early] + rows
        for row in rows:
            # The final row, too: it shares all of their steps.
            row["trunk"] = row["trunk"] or curve.name
        left_out = [] if rows else left_out
    elif early and final:
        left_out.append(
            f"{curve.origin}: run {curve.name}: {len(early)} intermediate checkpoints; --include-intermediate"
        )
    return rows, left_out


def _why_unfinished(curve: Curve, validated: bool) -> str:
    where = f"{curve.origin}: run {curve.name}"
    if not curve.is_finished:
        of = f" of {curve.total_steps}" if curve.total_steps else ""
        return f"{where}: unfinished, step {curve.last_step}{of}; --include-intermediate takes it in"
    last = f"last at step {validation_steps(curve)[-1]} of {curve.last_step}" if validated else "none"
    return f"{where}: no validation at the end ({last}); use --include-intermediate or --loss training"


def _row(curve: Curve, step: int, stage: str, validated: bool) -> dict[str, Any]:
    facts = {k: v for k, v in curve.facts.items() if k not in RATES}
    row = {"run": curve.name if stage == "final" else f"{curve.name}@{step}", "trunk": None, **facts}
    row |= {"tokens": tokens_at(curve, step), "checkpoint": stage, "cooled": cooled_at(curve, step)}
    if row["tokens"] and curve.facts.get("flops_exact_per_token"):
        row["flops_exact"] = row["tokens"] * curve.facts["flops_exact_per_token"]
    if row["tokens"] and row.get("tokens_vision") and stage == "intermediate":  # given for the whole run
        row["tokens_vision"] *= row["tokens"] / tokens_at(curve, curve.last_step)
    for key in ("flops", "flops_exact"):
        # Logged with training steps, which need not be those of the validations: taken from between two.
        if key in curve.points[step] or curve.series(key)[0].size:
            row[key] = float(np.interp(step, *curve.series(key)))
    if validated:
        row |= losses_of(curve.points[step]) | {"measured_on": "validation"}
    else:
        row |= {"loss": _mean_training_loss(curve, step), "measured_on": "training"}
    for column in filter(is_number, list(row)):
        if row[column] is not None:
            row[column] = parse_number(f"{curve.origin}: run {curve.name}, step {step}", column, row[column])
    for column in ("params", "tokens"):
        if row.get(column) is None:
            reason = f" ({curve.missing})" if curve.missing and column == "params" else ""
            fix = "tokens_per_step" if column == "tokens" else column
            raise InputError(
                f"{curve.origin}: run {curve.name}: column {column} is not in the log{reason}; "
                f"give {fix} with --set or --facts"
            )
    return row


def _mean_training_loss(curve: Curve, step: int) -> float:
    steps, values = curve.series("train_loss")
    if not steps.size:
        raise InputError(f"{curve.origin}: run {curve.name}: no loss in the log; name its tag with --map loss=TAG")
    # Of a short or sparse log that window may be empty.
    window = values[(steps > (1 - AVERAGED) * step) & (steps <= step)]
    return float(window.mean() if window.size else values[steps <= step][-1])


def tokens_at(curve: Curve, step: int) -> float | None:
    """Tokens seen at a step: as logged, else steps times ``tokens_per_step``, else between two logged values."""
    if "tokens" in curve.points[step]:
        return curve.points[step]["tokens"]
    if curve.facts.get("tokens_per_step"):
        return step * float(curve.facts["tokens_per_step"])
    steps, tokens = curve.series("tokens")
    if not steps.size:
        return curve.facts.get("tokens")
    # Beyond the last value at its mean rate; before the first from zero tokens at step zero.
    if step > steps[-1]:
        return float(tokens[-1] * step / steps[-1])
    return float(np.interp(step, np.append(0.0, steps), np.append(0.0, tokens)))


def cooled_at(curve: Curve, step: int) -> bool | None:
    """Whether the learning rate at a step is at most 20% of its peak so far; None if the log does not say."""
    steps, rates = curve.series("lr")
    before = steps <= step
    # Put this way round, a rate of NaN counts as not known, too.
    if not before.any() or not rates[before].max() > 0:
        at_end = curve.total_steps is not None and step >= curve.total_steps
        return curve.cooled if at_end else False if curve.cooled is not None else None
    return bool(rates[before][-1] <= COOLED * rates[before].max())
