"""A forecast: the losses that fits predict for a run before it is trained, dated and signed off; and its score.

A forecast that can be edited afterwards proves nothing. So the file carries the SHA-256 of its own content, the name
of who signs it off, the time, and the SHA-256 of the fits that it was made from. That finds a slip or a later edit; to
prove the date to strangers, put the file where others keep it too, such as a public repository.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.files import read_json
from megamm_laws.fitting.diagnostics import TOO_FAR
from megamm_laws.fitting.fit import OBJECTIVE
from megamm_laws.fitting.fits_file import FitEntry, read_fits_file
from megamm_laws.forecasts.one_run import noise_between_runs, with_noise
from megamm_laws.law import power_law
from megamm_laws.law.fitted import Law

SHARES = (80, 95)
"""Percent that the intervals hold."""
SAME_SIZE = 0.01
"""A run rounds its tokens up to whole steps, and its width to whole heads: relative difference that is let pass."""
CAUTIONS = 3
"""Warnings of the fit that a forecast repeats."""


@dataclass(kw_only=True)
class PlannedRun:
    """The run that a forecast is about."""

    group: str
    """Of the fits."""
    params: float
    tokens: float
    architecture: str | None = None
    mixture: str | None = None
    validation_set: str | None = None
    """Which rows the loss is measured on, as a run table says it; None where the fitted runs do not say."""


def make_forecast(fits: Path | str, run: PlannedRun, *, by: str, note: str = "") -> dict[str, Any]:
    """Predict every loss that the group has a law of.

    Args:
        fits: fits.json or its folder.
        by: who signs it off.

    Returns:
        What the file holds, with its own ``sha256``. Losses in nats; ``law`` holds the intervals of the fitted
        surface, ``run`` those of one run, which adds the noise between runs; ``deviation`` is the standard deviation
        of one run's log loss.

    Raises:
        InputError: the fits cannot be read, or have no law of that group.
    """
    for name, value in (("--params", run.params), ("--tokens", run.tokens)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name}: {value:g} is not a finite number above zero")
    if not by.strip():
        raise InputError("--by: no name is given; say who signs the forecast off")
    path = Path(fits)
    path = path / "fits.json" if path.is_dir() else path
    laws, losses, cautions = _laws_of(path, run.group), {}, []
    for column, (fit, law) in laws.items():
        losses[column] = _prediction(law, noise_between_runs(fit.entry), run)
        cautions += [f"{column}: {text}" for text in fit.entry["warnings"][:CAUTIONS]]
    fit, law = laws.get("loss") or next(iter(laws.values()))
    flops = 6 * law.kappa * run.params * run.tokens
    beyond = flops / law.flops_range[1]
    if beyond > TOO_FAR:
        cautions.insert(0, f"extrapolation: {beyond:.3g} times the FLOPs of the largest run, far beyond {TOO_FAR:g}")
    return _signed(
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "by": by.strip(),
            "note": note,
            "run": vars(run) | {"flops": flops, "times_largest_run": beyond},
            "fits": {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "n_runs": fit.entry["n_runs"],
                "form": fit.entry["form"],
                "largest_flops": law.flops_range[1],
            },
            "losses": losses,
            "cautions": cautions,
        }
    )


def _laws_of(path: Path, group: str) -> dict[str, tuple[FitEntry, Law]]:
    """The fits of a group, and their laws in N and D, by loss column."""
    entries = read_fits_file(path)
    found = {
        fit.loss_column: (fit, fit.law)
        for fit in entries
        if fit.group == group and fit.law is not None and fit.entry["objective_name"] == OBJECTIVE
    }
    if not found:
        groups = ", ".join(dict.fromkeys(fit.group for fit in entries)) or "none"
        raise InputError(
            f"{path}: no law of group {group!r} in params and tokens with objective {OBJECTIVE}; groups: {groups}"
        )
    return found


def _prediction(law: Law, noise: float, run: PlannedRun) -> dict[str, Any]:
    at = np.array([run.params]), np.array([run.tokens])
    value, draws = float(power_law.predict(law.parameters, *at)[0]), power_law.predict(law.draws, *at)[..., 0]
    of_law, of_run = {}, {}
    for share in SHARES:
        tail = (100 - share) / 2
        ends: list[float | None] = np.percentile(draws, [tail, 100 - tail]).tolist()
        deviations = NormalDist().inv_cdf(1 - tail / 100)
        of_law[str(share)], of_run[str(share)] = ends, with_noise(value, ends, noise, deviations)
    deviation = float(np.hypot(np.log(draws).std(), noise))
    return {"value": value, "law": of_law, "run": of_run, "noise": noise, "deviation": deviation}


# ----------------------------------------------------------------------------------------------- on paper


def _signed(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"sha256": _digest(content)}


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of the content, except the field ``sha256`` itself: keys in order, no spaces."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


FIELDS = {
    "forecast": ("date", "by", "run", "losses"),
    "score": ("forecast_sha256", "run", "losses", "remarks"),
}
"""What files hold at least, by what they are."""


def check_signed(path: Path | str, content: dict[str, Any], what: str) -> dict[str, Any]:
    """The content of a file, if it is a forecast or a score (``what``) as it was signed.

    Raises:
        InputError: it is something else, or has been changed since.
    """
    missing = [name for name in (*FIELDS[what], "sha256") if name not in content]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)}: missing; give a file that megamm-forecast wrote")
    if content["sha256"] != _digest(content):
        raise InputError(f"{path}: sha256: the content is not what was signed; restore the file as it was written")
    return content


def read_forecast(path: Path | str) -> dict[str, Any]:
    """A forecast from its file; raises as :func:`check_signed` does, also where it cannot be read."""
    return check_signed(path, read_json(path), "forecast")


# ------------------------------------------------------------------------------------------------- scores


def score_forecast(
    forecast: dict[str, Any], row: dict[str, Any], *, written: datetime | None = None, allow: bool = False
) -> dict[str, Any]:
    """Compare what came out with what was said.

    Args:
        forecast: from :func:`read_forecast`.
        row: of a run table.
        written: when the result was, if known.
        allow: score a run that is not the one of the forecast, and say what differs.

    Returns:
        What the file of the score holds. Per loss: ``actual``; ``error``, log of actual over forecast; ``deviations``,
        that in standard deviations of one run; ``inside``, by percent; ``crps``, the continuous ranked probability
        score of a normal in log loss (Gneiting and Raftery 2007, eq. 21): smaller is better, 0 best.

    Raises:
        InputError: the run is another one, or has none of the losses.
    """
    unlike = _differences(forecast["run"], row)
    if unlike and not allow:
        raise InputError(
            f"run {row.get('run', '?')} is not the run of the forecast: {'; '.join(unlike)}; score the run that was "
            "forecast, or pass --allow"
        )
    losses, remarks = {}, [f"not the run of the forecast: {text}" for text in unlike]
    for column, said in forecast["losses"].items():
        if row.get(column) is None:
            remarks.append(f"{column}: the run has none")
            continue
        losses[column] = _score(said, float(row[column]))
    if not losses:
        raise InputError(f"run {row.get('run', '?')}: has none of the losses {', '.join(forecast['losses'])}")
    if written is not None and written < datetime.fromisoformat(forecast["date"]):
        remarks.insert(0, f"the result was written at {written.isoformat(timespec='seconds')}, before the forecast")
    return _signed(
        {
            "forecast_sha256": forecast["sha256"],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": {name: row.get(name) for name in ("run", "architecture", "mixture", "params", "tokens")},
            "losses": losses,
            "remarks": remarks,
        }
    )


def _score(said: dict[str, Any], actual: float) -> dict[str, Any]:
    error, deviation, normal = math.log(actual / said["value"]), said["deviation"], NormalDist()
    z = error / deviation
    crps = deviation * (z * (2 * normal.cdf(z) - 1) + 2 * normal.pdf(z) - 1 / math.sqrt(math.pi))
    inside = {}
    for share, (low, high) in said["run"].items():
        inside[share] = (low is None or low <= actual) and (high is None or actual <= high)
    return {"actual": actual, "error": error, "deviations": z, "inside": inside, "crps": crps}


def _differences(planned: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """What tells a run from the one that was planned."""
    found = []
    for name in ("params", "tokens"):
        if abs(row[name] / planned[name] - 1) > SAME_SIZE:
            found.append(f"{name} {row[name]:.6g}, forecast for {planned[name]:.6g}")
    for name in ("architecture", "mixture", "validation_set"):
        # What either of them does not say cannot differ.
        if planned.get(name) and row.get(name) and planned[name] != row[name]:
            found.append(f"{name} {row[name]}, forecast for {planned[name]}")
    return found
