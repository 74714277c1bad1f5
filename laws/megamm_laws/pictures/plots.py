"""The pictures of a scaling study, from plain arrays: charts as data, for a page or a paper.

Frontiers with bands, residuals against N, D and C, correlations of the fitted constants, hold-out, and isoFLOP
profiles. Colours are those of Okabe and Ito, told apart by colour-blind readers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megamm_laws.errors import InputError
from megamm_laws.files import atomic_path
from megamm_laws.pictures.charts import Chart, ChartAxis, Panel, Series, to_pdf, to_png
from megamm_laws.pictures.units import count, power

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7a8089")
DRAWS_SHOWN = 300
SHADES = ("#0b3c6e", "#f09a4a")
"""Of the smallest and the largest budget of isoFLOP profiles."""
BUDGETS_NAMED = 8
"""Budgets of isoFLOP profiles in a legend; their shades tell the others."""
LOG_A, LOG_B = "log A at mean N", "log B at mean D"
"""Keys of PlotGroup.draws: logarithms of the terms A/N^alpha and B/D^beta at the mean of log N and of log D."""
FLOPS = ChartAxis(label="training compute (FLOPs)", log=True, form=power)
PARAMS = ChartAxis(label="parameters", log=True, form=count)
TOKENS = ChartAxis(label="training tokens", log=True, form=count)


@dataclass(kw_only=True)
class PlotGroup:
    """One fitted group; n runs, m points of the frontier, R bootstrap draws.

    Attributes:
        names: of the runs, for hovering.
        params, tokens, flops, losses: (n,) of the runs; ``losses`` in nats.
        predicted: (n,) by the fit.
        grid, frontier: (m,) FLOPs and nats.
        band: (2, m), 95%.
        draws: alpha, beta, LOG_A, LOG_B -> (R,); empty to leave correlations out.
        held_out: FLOPs and relative errors (predicted/measured - 1) of the runs kept back, (k,) each.
        exponents: a with and without the runs kept back.
    """

    name: str
    colour: str
    names: Sequence[str]
    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    losses: np.ndarray
    predicted: np.ndarray
    grid: np.ndarray
    frontier: np.ndarray
    band: np.ndarray
    draws: dict[str, np.ndarray] = field(default_factory=dict)
    held_out: tuple[np.ndarray, np.ndarray] | None = None
    exponents: tuple[float, float] | None = None

    def hover(self) -> list[str]:
        """A text per run."""
        return [
            f"{name}\n{count(n)} parameters, {count(d)} tokens\n{power(c)} FLOPs, loss {loss:.3f}"
            for name, n, d, c, loss in zip(self.names, self.params, self.tokens, self.flops, self.losses)
        ]


def fit_charts(groups: Sequence[PlotGroup], loss_name: str = "loss") -> list[Chart]:
    """Every chart that the groups have data for."""
    charts = [frontiers(groups, loss_name), residuals(groups)]
    if any(group.draws for group in groups):
        charts.append(correlations(groups))
    if any(group.held_out is not None for group in groups):
        charts.append(holdout_chart(groups))
    return charts


def frontiers(groups: Sequence[PlotGroup], loss_name: str = "loss") -> Chart:
    """Runs, fitted frontiers and their 95% bands over compute."""
    series = []
    for group in groups:
        series.append(
            Series(
                name=f"{group.name}, {len(group.flops)} runs",
                x=group.flops,
                y=group.losses,
                colour=group.colour,
                line=None,
                marker="dot",
                opacity=0.6,
                hover=group.hover(),
            )
        )
    for group in groups:
        series.append(
            Series(
                name=f"{group.name}, frontier",
                x=group.grid,
                y=group.frontier,
                colour=group.colour,
                width=3,
                band=group.band,
            )
        )
    panel = Panel(title="", x=FLOPS, y=ChartAxis(label=f"{loss_name} (nats per token)"), series=series)
    caption = "Points are finished runs; lines the lowest loss that a budget can buy by the fit, with its 95% band."
    return Chart(name="frontiers", caption=caption, panels=[panel], columns=1, height=430)


def residuals(groups: Sequence[PlotGroup]) -> Chart:
    """Measured loss above the fit against N, D and C."""
    panels = []
    for axis, values in ((PARAMS, "params"), (TOKENS, "tokens"), (FLOPS, "flops")):
        series = [
            Series(
                name=group.name,
                x=getattr(group, values),
                y=100 * (group.losses / group.predicted - 1),
                colour=group.colour,
                line=None,
                marker="dot",
                opacity=0.7,
                hover=group.hover(),
            )
            for group in groups
        ]
        y = ChartAxis(label="measured loss above the fit (%)")
        panels.append(Panel(title=f"against {axis.label}", x=axis, y=y, baseline=0.0, series=series))
    caption = "A trend or a fan in one of these says that the form of the law does not hold over the whole range."
    return Chart(name="residuals", caption=caption, panels=panels)


def correlations(groups: Sequence[PlotGroup]) -> Chart:
    """Bootstrap draws of pairs of constants: a thin line of points is a direction that the runs leave open."""
    panels = []
    for group in groups:
        if not group.draws:
            continue
        for x, y in (("alpha", "beta"), ("alpha", LOG_A), ("beta", LOG_B)):
            first, second = group.draws[x], group.draws[y]
            spread = min(np.ptp(first), np.ptp(second)) > 0
            r = f", r = {np.corrcoef(first, second)[0, 1]:.3f}" if spread else ""
            points = Series(
                name=group.name,
                x=first[:DRAWS_SHOWN],
                y=second[:DRAWS_SHOWN],
                colour=group.colour,
                line=None,
                marker="dot",
                opacity=0.35,
            )
            panels.append(
                Panel(
                    title=f"{group.name}: {y} over {x}{r}", x=ChartAxis(label=x), y=ChartAxis(label=y), series=[points]
                )
            )
    caption = (
        "Each point is one draw behind the intervals. Log A and log B are those of A/N^alpha and B/D^beta at the mean "
        "log N and log D of the runs; A and B at N = D = 1 mirror the exponents, with a correlation of nearly 1."
    )
    return Chart(name="correlations", caption=caption, panels=panels)


def holdout_chart(groups: Sequence[PlotGroup]) -> Chart:
    """Error of the largest runs as predicted from the rest, with the drift of the allocation exponent."""
    series = []
    for group in groups:
        if group.held_out is None:
            continue
        flops, errors = group.held_out
        drift = ""
        if group.exponents is not None:
            with_them, without = group.exponents
            drift = f", a {without:.3f} without them, {with_them:.3f} with"
        series.append(
            Series(
                name=f"{group.name}: {len(flops)} runs{drift}",
                x=flops,
                y=100 * np.asarray(errors),
                colour=group.colour,
                line=None,
                marker="ring",
            )
        )
    y = ChartAxis(label="predicted loss above the measured (%)")
    panel = Panel(title="", x=FLOPS, y=y, baseline=0.0, series=series)
    caption = (
        "Runs of largest compute, predicted by a fit to the others. A small error of the loss does not mean that the "
        "compute-optimal size is known: N* ~ C^a, see how a moves."
    )
    return Chart(name="holdout", caption=caption, panels=[panel], columns=1, height=360)


# -------------------------------------------------------------------------------------------------- isoFLOP


@dataclass(kw_only=True)
class Budget:
    """Runs of one compute budget: n runs, the curve through them (m points) and its minimum."""

    flops: float
    params: np.ndarray
    losses: np.ndarray
    grid: np.ndarray
    curve: np.ndarray
    optimum: tuple[float, float] | None
    """Params and loss at the minimum; None where it is not inside the runs."""
    interval: tuple[float, float] | None = None
    """95% of the params there."""


def isoflops(
    name: str, budgets: Sequence[Budget], coefficient: float, exponent: float, loss_name: str = "loss"
) -> Chart:
    """Profiles of loss over N, one per budget, and N* over C with the line coefficient*C^exponent."""
    profiles: list[Series] = []
    minima: list[Series] = []
    named = set(np.linspace(0, len(budgets) - 1, min(BUDGETS_NAMED, len(budgets))).round())
    for i, budget in enumerate(budgets):
        shade = blend(*SHADES, i / max(1, len(budgets) - 1))
        label = f"{power(budget.flops)} FLOPs"
        profiles.append(Series(name=label, x=budget.grid, y=budget.curve, colour=shade, legend=False))
        hover = [f"{label}\n{count(n)} parameters, loss {loss:.3f}" for n, loss in zip(budget.params, budget.losses)]
        measured = Series(name=label, x=budget.params, y=budget.losses, colour=shade, line=None, marker="dot")
        # Of the two series of a budget only its points stand in the legend.
        profiles.append(replace(measured, hover=hover, legend=i in named))
        if budget.optimum is not None:
            n, loss = budget.optimum
            minima.append(Series(name="minimum", x=[n], y=[loss], colour="#1f2430", line=None, marker="ring"))
    found = [(b.flops, b.optimum[0]) for b in budgets if b.optimum is not None]
    flops = np.array([c for c, _ in found])
    # Without any minimum there is no least and no largest.
    grid = np.geomspace(flops.min(), flops.max(), 64) if len(found) else np.array([])
    bars = [
        Series(name="95%", x=[b.flops, b.flops], y=list(b.interval), colour=PALETTE[0], legend=False)
        for b in budgets
        if b.optimum is not None and b.interval is not None
    ]
    optima = [
        *bars,
        Series(
            name="minimum, with 95%",
            x=flops,
            y=[n for _, n in found],
            colour=PALETTE[0],
            line=None,
            marker="dot",
        ),
        Series(name=f"N* ~ C^{exponent:.4f}", x=grid, y=coefficient * grid**exponent, colour=PALETTE[1]),
    ]
    panels = [
        Panel(
            title="Loss over size at equal compute",
            x=PARAMS,
            y=ChartAxis(label=f"{loss_name} (nats per token)"),
            series=[*profiles, *minima],
        ),
        Panel(title="Compute-optimal size", x=FLOPS, y=PARAMS, series=optima),
    ]
    caption = "Each curve joins runs of one compute budget; its minimum is the size to train with it."
    return Chart(name=name, caption=caption, panels=panels, columns=2, legend_per_panel=True, height=380)


def blend(first: str, second: str, share: float) -> str:
    """The colour at ``share`` of the way from one ``#rrggbb`` to another."""
    ends = zip(*(bytes.fromhex(colour[1:]) for colour in (first, second)))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in ends)


# --------------------------------------------------------------------------------------------------- files


def write_charts(folder: Path | str, charts: Sequence[Chart]) -> list[Path]:
    """A PNG and a PDF of each chart, all drawn before the first is written; returns the paths.

    Raises:
        InputError: ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; --out names a folder")
    files: dict[str, bytes] = {}
    for chart in charts:
        files |= {f"{chart.name}.png": to_png(chart), f"{chart.name}.pdf": to_pdf(chart)}
    for name, content in files.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    return [folder / name for name in files]
