"""Write isoFLOP fits: `isoflops.json`, `isoflops.md` and the profiles as `isoflops.png` and `.pdf`."""

import json
from dataclasses import replace
from pathlib import Path

from megamm_laws.files import write_text
from megamm_laws.fitting.isoflop import FLOOR, IsoFlopFit
from megamm_laws.fitting.pictures import isoflop_chart
from megamm_laws.pictures.charts import Chart
from megamm_laws.pictures.plots import write_charts


def write_isoflops(folder: Path | str, fits: list[IsoFlopFit]) -> list[Path]:
    """Write the folder of results, computed before the first file is written; returns the paths.

    Raises:
        InputError: ``folder`` is a file.
    """
    folder = Path(folder)
    document = json.dumps({"fits": [fit.to_json() for fit in fits]}, indent=2, allow_nan=False)
    page = to_markdown(fits)
    plots = write_charts(folder, [profile_chart(fits)])
    write_text(folder / "isoflops.md", page)
    write_text(folder / "isoflops.json", document + "\n")
    return [folder / "isoflops.json", folder / "isoflops.md", *plots]


def to_markdown(fits: list[IsoFlopFit]) -> str:
    """Exponents and the optimum of every budget, with 95% intervals over noise draws."""
    lines = ["# IsoFLOP fits", ""]
    meanings = {"a": "a (N* ~ C^a)", "b": "b (D* ~ C^b)", "c": "c (L* ~ C^c)"}
    for fit in fits:
        entry = fit.to_json()
        lines += [
            f"## {fit.group}, {fit.loss_column}",
            "",
            "| exponent | value | 95% interval |",
            "| --- | --- | --- |",
        ]
        for name, value in fit.exponents.items():
            low, high = entry["intervals"][name]
            lines.append(f"| {meanings[name]} | {value:.4f} | [{low:.4f}, {high:.4f}] |")
        parabola = "not available" if fit.parabola_a is None else f"{fit.parabola_a:.4f}"
        lines += [
            "",
            f"- {len(fit.table)} runs, {len(fit.used)} of {len(fit.profiles)} budgets used; noise {fit.noise:.2g} "
            f"nats, {len(fit.exponent_draws)} draws, seed {fit.seed}",
            f"- a by parabolas through the runs around each minimum: {parabola}",
            "- intervals of exponents are percentiles of the draws; that of N* is 1.96 times their spread to either "
            f"side, taken as at least {FLOOR} of the distance between sizes, also in the plot",
            "",
            "| FLOPs | runs | N* | 95% interval | D* | loss |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for budget in entry["budgets"]:
            head = f"| {budget['flops']:.3g} | {budget['n_runs']} "
            if "left_out" in budget:
                lines.append(head + f"| not used: {budget['left_out']} | | | |")
                continue
            low, high = budget["params_interval"]
            lines.append(
                head + f"| {budget['params']:.4g} | [{low:.4g}, {high:.4g}] | {budget['tokens']:.4g} "
                f"| {budget['loss']:.4f} |"
            )
        lines += ["", *([f"- **Warning**: {text}" for text in fit.warnings] or ["No warnings."]), ""]
    return "\n".join(lines)


def profile_chart(fits: list[IsoFlopFit]) -> Chart:
    """A row per fit: its profiles beside N* over compute."""
    charts = [isoflop_chart(fit, "isoflops") for fit in fits]
    return replace(charts[0], panels=[panel for chart in charts for panel in chart.panels])
