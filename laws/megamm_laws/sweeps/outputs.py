"""Write fits of swept rates: `rates.json`, `rates.md` and the curves as `rates.png` and `.pdf`."""

from pathlib import Path
from typing import Any

import numpy as np

from megamm_laws.files import write_json, write_text
from megamm_laws.pictures.charts import Chart, ChartAxis, Panel, Series
from megamm_laws.pictures.plots import PALETTE, PARAMS, SHADES, TOKENS, blend, write_charts
from megamm_laws.pictures.units import count, digits
from megamm_laws.sweeps.cells import COLUMNS, Cell
from megamm_laws.sweeps.rates import RateFit

POINTS = 64
DARK = "#1f2430"
SYMBOLS = {"params": "N", "tokens": "D"}


def write_rates(folder: Path | str, fits: list[RateFit]) -> list[Path]:
    """Write the folder of results, computed before the first file is written; returns the paths.

    Raises:
        InputError: ``folder`` is a file.
    """
    folder = Path(folder)
    document, page = {"fits": [fit.to_json() for fit in fits]}, to_markdown(fits)
    plots = write_charts(folder, [rates_chart(fits)])
    write_text(folder / "rates.md", page)
    write_json(folder / "rates.json", document)
    return [folder / "rates.json", folder / "rates.md", *plots]


def law_text(fit: RateFit) -> str:
    """The law with 95% intervals of its exponents, such as ``lr* = 12.3 N^-0.4 [-0.5, -0.3]``."""
    if fit.law is None:
        return f"no law of {fit.column}"
    law = fit.law.to_json()
    parts = []
    for name, value in law["exponents"].items():
        low, high = law["intervals"][name]
        parts.append(f" {SYMBOLS[name]}^{value:.3f} [{low:.3f}, {high:.3f}]")
    return f"{fit.column}* = {law['coefficient']:.3g}" + "".join(parts)


def planned_text(fit: RateFit) -> str | None:
    """The planned run with its rate; None without either."""
    found = fit.prediction()
    if found is None or fit.planned is None:
        return None
    n, d = (count(value) for value in fit.planned)
    return f"{n} parameters, {d} tokens: {fit.column} {found[0]:.3g} [{found[1]:.3g}, {found[2]:.3g}]"


def to_markdown(fits: list[RateFit]) -> str:
    """The law, the planned run, the cells and the warnings of each fit."""
    lines = ["# Swept rates", ""]
    for fit in fits:
        entry = fit.to_json()
        lines += [f"## {fit.group}, {fit.column}, {fit.loss_column}", "", f"- law: {law_text(fit)}"]
        if fit.law is not None:
            lines.append(f"- scatter of the cells about it beyond their intervals: a factor of {_factor(fit)}")
        if planned := planned_text(fit):
            lines.append(f"- planned run: {planned}")
        lines += [
            f"- noise {fit.noise.nats:.2g} nats; intervals hold 95%",
            "",
            f"| parameters | tokens | runs | swept | best {fit.column} | 95% interval | used | costs (nats) |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_line(cell) for cell in entry["cells"]]
        lines += ["", *([f"- **Warning**: {text}" for text in fit.warnings] or ["No warnings."]), ""]
    return "\n".join(lines)


def _factor(fit: RateFit) -> str:
    assert fit.law is not None
    return digits(float(np.exp(fit.law.scatter)))


def _line(cell: dict[str, Any]) -> str:
    low, high = cell["range"]
    head = f"| {count(cell['params'])} | {count(cell['tokens'])} | {cell['n_runs']} | {low:.3g} to {high:.3g} "
    used = f"{cell['used']:.3g}" if "used" in cell else ""
    costs = f"{cell['excess']:.3g}" if "excess" in cell else ""
    if "left_out" in cell:
        return head + f"| none: {cell['left_out']} | | {used} | {costs} |"
    ends = ["open" if end is None else f"{end:.3g}" for end in cell["interval"]]
    return head + f"| {cell['optimum']:.3g} | [{', '.join(ends)}] | {used} | {costs} |"


def rates_chart(fits: list[RateFit]) -> Chart:
    """Two panels per fit: the curves of its cells, and their optima with the law over size (or over tokens)."""
    panels = [panel for fit in fits for panel in (_curves(fit), _optima(fit))]
    caption = "Each curve is a quadratic near the best value of one size and length; the line joins what the law gives."
    return Chart(name="rates", caption=caption, panels=panels, columns=2, legend_per_panel=True, height=380)


def _axis(fit: RateFit) -> ChartAxis:
    return ChartAxis(label=COLUMNS[fit.column], log=True, form=_rate if fit.column == "lr" else count)


def _rate(value: float) -> str:
    return f"{value:.2g}"


def _curves(fit: RateFit) -> Panel:
    swept = [cell for cell in fit.cells if cell.swept]
    series: list[Series] = []
    for i, cell in enumerate(swept):
        shade = blend(*SHADES, i / max(1, len(swept) - 1))
        name = f"{count(cell.params)}, {count(cell.tokens)} tokens"
        # Above its own lowest point, as the sizes lie much farther apart than the rates of one.
        low = float(cell.losses.min()) if cell.problem is not None else cell.lowest
        above = cell.losses - low
        series.append(Series(name=name, x=cell.rates, y=above, colour=shade, line=None, marker="dot"))
        if cell.problem is None and cell.near is not None:
            grid = np.geomspace(cell.rates[cell.near].min(), cell.rates[cell.near].max(), POINTS)
            series.append(Series(name=name, x=grid, y=cell.curve(grid) - low, colour=shade, legend=False))
            at = [float(np.exp(cell.optimum))]
            series.append(Series(name="best", x=at, y=[0.0], colour=DARK, line=None, marker="ring"))
    title = f"{fit.group}: loss over {COLUMNS[fit.column]}"
    label = f"{fit.loss_column} above the lowest (nats per token)"
    return Panel(title=title, x=_axis(fit), y=ChartAxis(label=label), series=series)


def _optima(fit: RateFit) -> Panel:
    over_tokens = fit.law is not None and fit.law.terms == ("tokens",)
    series: list[Series] = []
    for cell in fit.used:
        low, high = np.exp(cell.interval(fit.noise))
        bar = [max(low, cell.rates[0]), min(high, cell.rates[-1])]  # an open end is drawn to the edge of the sweep
        series.append(Series(name="95%", x=[_place(cell, over_tokens)] * 2, y=bar, colour=PALETTE[0], legend=False))
    x = [_place(cell, over_tokens) for cell in fit.used]
    y = [float(np.exp(cell.optimum)) for cell in fit.used]
    series.append(Series(name="best, with 95%", x=x, y=y, colour=PALETTE[0], line=None, marker="dot"))
    if fit.law is not None:
        law = fit.law
        for i, tokens in enumerate(sorted({cell.tokens for cell in fit.used}) if "tokens" in law.terms else [None]):
            chosen = [cell for cell in fit.used if tokens is None or over_tokens or cell.tokens == tokens]
            chosen.sort(key=lambda cell: _place(cell, over_tokens))
            line = Series(
                name="law",
                x=[_place(cell, over_tokens) for cell in chosen],
                y=[law.predict(cell.params, cell.tokens)[0] for cell in chosen],
                colour=PALETTE[1],
                legend=i == 0,
            )
            series.append(line)
    if (found := fit.prediction()) and fit.planned:
        at = fit.planned[1] if over_tokens else fit.planned[0]
        series.append(Series(name="95%", x=[at, at], y=list(found[1:]), colour=PALETTE[2], legend=False))
        series.append(Series(name="planned", x=[at], y=[found[0]], colour=PALETTE[2], line=None, marker="ring"))
    return Panel(
        title=f"{fit.group}: best {COLUMNS[fit.column]}",
        x=TOKENS if over_tokens else PARAMS,
        y=_axis(fit),
        series=[s for s in series if len(s.x)],
    )


def _place(cell: Cell, over_tokens: bool) -> float:
    return cell.tokens if over_tokens else cell.params
