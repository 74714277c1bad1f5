"""Two groups of runs compared under every count of FLOPs: `comparison.json`, `comparison.md` and pictures."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamm_laws.comparison.compare import (
    Comparison,
    Crossover,
    Gain,
    common_range,
    crossover_sentence,
    gain_at,
    gaps,
    verdict,
)
from megamm_laws.comparison.recounted import COUNTED, Recounted, compare_under_conventions, group_column, runs_of
from megamm_laws.errors import InputError
from megamm_laws.files import atomic_path, write_text
from megamm_laws.fitting.fits_file import FitEntry, check_runs, read_plain_fits
from megamm_laws.law.fitted import Pairing
from megamm_laws.pictures.charts import Chart, ChartAxis, Panel, Series, to_pdf, to_png
from megamm_laws.pictures.units import power
from megamm_laws.runs.table import RunTable

MISFIT = 0.05
"""A run whose FLOPs are off the fitted cost by more than this share is worth a note."""


@dataclass(kw_only=True)
class Report:
    """Everything that the comparison of two groups gives."""

    groups: tuple[str, str]
    loss_column: str
    accounted: list[Recounted]
    gains: dict[str, list[Gain]]
    """By count of FLOPs."""
    at: list[float]
    """FLOPs that were asked for; empty where none were."""
    notes: list[str]
    """On counts of FLOPs."""
    warnings: list[str]
    """Those of both fits: a verdict at 95% is worth no more than their intervals."""

    @property
    def pairing(self) -> Pairing | None:
        """What matched runs of the two groups have in common."""
        return self.accounted[0].comparison.pairing

    @property
    def pairing_sentence(self) -> str:
        """How the errors of the two fits hang together."""
        if self.pairing is None:
            return "none were drawn together, so that errors of the two fits are taken for independent"
        return (
            f"{self.pairing.matched} pairs of runs match, and their errors have a correlation of "
            f"{self.pairing.correlation:.2f}: what they share cancels"
        )


def compare_fits(
    folder: Path | str,
    table: RunTable,
    *,
    groups: Sequence[str] | None = None,
    loss_column: str = "loss",
    flops_range: tuple[float, float] | None = None,
    at: Sequence[float] = (),
) -> Report:
    """Compare two groups whose fits lie in ``folder``, with the runs of ``table`` that they were fitted to.

    Args:
        groups: two names; by default early and late, or the only two there are.
        at: FLOPs at which to say what the second needs for the loss of the first; by default the largest that both
            have runs at.

    Raises:
        InputError: no fits, a group that is not there, or runs that are not those of the fits.
    """
    fits = read_plain_fits(folder, loss_column)
    pair = _pair(fits, groups, folder, loss_column)
    column = group_column(table, set(fits))
    one_runs, other_runs = (runs_of(table, column, fit.group, loss_column) for fit in pair)
    for fit, runs in zip(pair, (one_runs, other_runs)):
        check_runs(fit, runs, folder)
    first, second = (fit.plain_law for fit in pair)
    accounted, notes = compare_under_conventions(first, second, (one_runs, other_runs), flops_range)
    gains = {}
    for one in accounted:
        points = list(at) or [common_range(*one.laws)[1]]
        gains[one.counting] = [gain_at(*one.laws, flops) for flops in points]
        for law, cost in zip(one.laws, one.costs):
            if cost.misfit > MISFIT:
                notes.append(
                    f"{COUNTED[one.counting]}: FLOPs of {law.name} leave kappa*N^{1 + cost.growth:.3g}*D by up to "
                    f"{cost.misfit:.0%}; vary size and shape together, or compare one mixture at a time"
                )
    return Report(
        groups=(first.name, second.name),
        loss_column=loss_column,
        accounted=accounted,
        gains=gains,
        at=list(at),
        notes=notes,
        warnings=[f"from the fit of {law.name}: {text}" for law in (first, second) for text in law.warnings],
    )


def _pair(
    fits: dict[str, FitEntry], groups: Sequence[str] | None, folder: Path | str, column: str
) -> tuple[FitEntry, FitEntry]:
    names = list(fits)
    if groups is None:
        groups = ("early", "late") if {"early", "late"} <= set(names) else names
        if len(groups) != 2:
            raise InputError(f"{folder}: fits of {column} for {', '.join(names) or 'no group'}; give two with --groups")
    missing = [name for name in groups if name not in fits]
    if len(groups) != 2 or missing or groups[0] == groups[1]:
        raise InputError(f"--groups: {','.join(groups)}: give two different ones of {', '.join(names) or 'none'}")
    return fits[groups[0]], fits[groups[1]]


# -------------------------------------------------------------------------------------------------- writing


def write_comparison(folder: Path | str, report: Report) -> list[Path]:
    """Write the folder of results, computed before the first file is written; returns the paths.

    Raises:
        InputError: ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; --out names a folder")
    document = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    page = to_markdown(report)
    files: dict[str, bytes] = {}
    for one in report.accounted:
        chart = lead_chart(f"lead_{one.counting}", one.comparison, report.groups)
        files |= {f"{chart.name}.png": to_png(chart), f"{chart.name}.pdf": to_pdf(chart)}
    for name, content in files.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    write_text(folder / "comparison.md", page)
    write_text(folder / "comparison.json", document)
    return [folder / name for name in ("comparison.json", "comparison.md", *files)]


def to_json(report: Report) -> dict[str, Any]:
    """The whole comparison; infinite numbers are null."""
    entries = []
    for one in report.accounted:
        comparison = one.comparison
        entries.append(
            {
                "counting": one.counting,
                "explained": COUNTED[one.counting],
                "verdict": verdict(comparison, report.at),
                "smallest_gaps": [{"flops": c, "percent_of_loss": gap} for c, gap in gaps(comparison, report.at)],
                "extrapolated": comparison.extrapolated,
                "cost": {
                    law.name: {"kappa": c.kappa, "growth": c.growth, "reference": c.reference, "misfit": c.misfit}
                    for law, c in zip(one.laws, one.costs)
                },
                "crossover": _crossover_json(comparison.crossover),
                "crossing_share": comparison.crossing_share,
                "gains": [
                    {
                        "flops": gain.flops,
                        "ratio": _finite(gain.ratio),
                        "interval": [_finite(end) for end in gain.interval],
                        "beyond_runs": gain.beyond,
                        "sentence": gain.sentence,
                    }
                    for gain in report.gains[one.counting]
                ],
                "flops": comparison.flops.tolist(),
                "difference": comparison.difference.tolist(),
                "pointwise": comparison.pointwise.tolist(),
                "simultaneous": comparison.simultaneous.tolist(),
                "gain": [_finite(x) for x in comparison.gain],
                "gain_interval": [[_finite(x) for x in end] for end in comparison.gain_interval],
            }
        )
    return {
        "groups": report.groups,
        "loss_column": report.loss_column,
        "pairing": None if report.pairing is None else _pairing_json(report.pairing),
        "accountings": entries,
        "notes": report.notes,
        "warnings": report.warnings,
    }


def _pairing_json(pairing: Pairing) -> dict[str, Any]:
    return {"matched": pairing.matched, "correlation": pairing.correlation}


def _crossover_json(crossing: Crossover | None) -> dict[str, Any] | None:
    if crossing is None:
        return None
    return {"flops": crossing.flops, "interval": list(crossing.interval), "further": crossing.further}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def to_markdown(report: Report) -> str:
    """The comparison in sentences, a section per count of FLOPs."""
    first, second = report.groups
    lines = [f"# {first} against {second}: {report.loss_column}".replace("|", "\\|"), ""]
    lines += [
        "Frontiers of the fitted laws at equal training compute. Brackets are 95% bootstrap intervals; verdicts use a "
        "band that holds the whole curve with 95%.",
        "",
        f"Matched runs: {report.pairing_sentence}.",
        "",
    ]
    for one in report.accounted:
        comparison = one.comparison
        lines += [
            f"## {COUNTED[one.counting]}",
            "",
            f"- {verdict(comparison, report.at)}",
            f"- {crossover_sentence(comparison)}",
        ]
        lines += [f"- {gain.sentence}" for gain in report.gains[one.counting]]
        lines += [
            "",
            f"| FLOPs | loss of {first} minus {second} (nats) | simultaneous 95% band |",
            "| --- | --- | --- |",
        ]
        for i in np.linspace(0, len(comparison.flops) - 1, 5).round().astype(int):
            low, high = comparison.simultaneous[:, i]
            lines.append(f"| {comparison.flops[i]:.3g} | {comparison.difference[i]:+.4f} | [{low:+.4f}, {high:+.4f}] |")
        lines.append("")
    lines += [f"- Note: {note}" for note in report.notes]
    lines += [f"- Warning {text}".replace("|", "\\|") for text in report.warnings]
    return "\n".join(lines).rstrip() + "\n"


def lead_chart(name: str, comparison: Comparison, names: tuple[str, str]) -> Chart:
    """Difference in loss with its simultaneous band, and compute for the same loss, over compute."""
    first, second = names
    x = ChartAxis(label="training compute (FLOPs)", log=True, form=power)
    gain = np.clip(np.stack([comparison.gain, *comparison.gain_interval]), 1e-2, 1e2)
    difference = Series(
        name=f"{first} minus {second}, with the 95% band of the whole curve",
        x=comparison.flops,
        y=comparison.difference,
        colour="#3b4252",
        band=comparison.simultaneous,
    )
    ratio = Series(
        name=f"FLOPs of {second} over those of {first}, with 95% intervals",
        x=comparison.flops,
        y=gain[0],
        colour="#009E73",
        band=gain[1:],
    )
    panels = [
        Panel(
            title="Loss difference, first ahead below 0",
            x=x,
            y=ChartAxis(label="loss difference (nats)"),
            baseline=0.0,
            series=[difference],
        ),
        Panel(
            title="Compute for equal loss, first ahead above 1",
            x=x,
            y=ChartAxis(label="ratio of FLOPs", log=True),
            baseline=1.0,
            series=[ratio],
        ),
    ]
    caption = (
        "Where a band contains the horizontal line, the runs cannot tell which architecture is ahead at that budget."
    )
    return Chart(name=name, caption=caption, panels=panels, columns=2)
