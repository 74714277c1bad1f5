"""Charts as data, drawn by matplotlib as PNG and PDF files (a page may draw the same data its own way)."""

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from megamm_laws.pictures.units import digits, log_ticks

GRID, AXIS, FONT = "#e4e7eb", "#5b6270", "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
LEGEND_SIZE = 9
"""Points."""
SWATCH, LEGEND_LINE = 0.6, 0.2
"""Width of a mark with the space around it, and height of a line, in a legend of that size; inches."""
LONGEST = 60
"""Letters of a line of a legend."""
FEW_ENTRIES = 4
DASHES = {"solid": "-", "dot": ":", "dash": "--"}


@dataclass(kw_only=True)
class ChartAxis:
    """An axis; ``form`` writes the ticks of a logarithmic one."""

    label: str
    log: bool = False
    form: Callable[[float], str] = digits
    range: tuple[float, float] | None = None


@dataclass(kw_only=True)
class Series:
    """Points of one colour, joined by a line, marked, or both; ``band`` (2, m) is shaded around them."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    colour: str
    line: str | None = "solid"
    width: float = 2.0
    marker: str | None = None
    """Filled (``dot``) or hollow (``ring``) marks; None for none."""
    opacity: float = 1.0
    band: np.ndarray | None = None
    hover: Sequence[str] | None = None
    legend: bool = True


@dataclass(kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    x: ChartAxis
    y: ChartAxis
    series: list[Series]
    baseline: float | None = None
    """Height of a horizontal reference line."""


@dataclass(kw_only=True)
class Chart:
    """Panels side by side under one legend (or one each), with a caption in plain text."""

    name: str
    caption: str
    panels: list[Panel]
    columns: int = 3
    height: int = 300
    legend_per_panel: bool = False


def legend(panels: list[Panel]) -> list[Series]:
    """One series for each name in the legend."""
    found: dict[str, Series] = {}
    for panel in panels:
        for series in panel.series:
            if series.legend:
                found.setdefault(series.name, series)
    return list(found.values())


def extent(panel: Panel, axis: str) -> tuple[float, float]:
    """The range of an axis: as given, or the data's with a margin."""
    given = getattr(panel, axis).range
    if given:
        return given
    parts = [np.asarray(getattr(s, axis), float) for s in panel.series]
    if axis == "y":
        parts += [np.ravel(s.band) for s in panel.series if s.band is not None]
        parts += [np.array([panel.baseline])] if panel.baseline is not None else []
    values = np.concatenate(parts) if parts else np.array([1.0])
    return padded(values, getattr(panel, axis).log)


def padded(values: np.ndarray, log: bool) -> tuple[float, float]:
    """The finite range of ``values`` widened by 4% on either side."""
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    if log:
        margin = (high / low) ** 0.04 if high > low else 1.5
        return low / margin, high * margin
    margin = 0.04 * (high - low) or max(abs(high) * 0.1, 1e-9)
    return low - margin, high + margin


def to_png(chart: Chart) -> bytes:
    """The whole chart as a PNG file."""
    return _file(chart, "png")


def to_pdf(chart: Chart) -> bytes:
    """The whole chart as a PDF file with embedded fonts; the same chart gives the same bytes."""
    return _file(chart, "pdf")


def _file(chart: Chart, form: str) -> bytes:
    columns = min(chart.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    wide = 7.5 if columns == 1 else 4.2 * columns
    handles = [] if chart.legend_per_panel else _handles(chart.panels)
    across = _across(handles, wide)
    lines = max((str(handle.get_label()).count("\n") + 1 for handle in handles), default=0)
    tall = (3.3 * rows + 0.2 if columns > 1 else 4.4) + LEGEND_LINE * lines * -(-len(handles) // across)
    # Not by pyplot, which keeps every figure and may look for a display.
    figure = Figure(figsize=(wide, tall), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, chart.panels):
        _draw_panel(axes, panel)
        if chart.legend_per_panel:
            _legend_of_panel(axes, panel)
    for axes in grid[len(chart.panels) :]:
        axes.set_visible(False)
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=across, fontsize=LEGEND_SIZE, frameon=False)
    out = io.BytesIO()
    # The time would make each PDF differ from the last.
    metadata = {"CreationDate": None} if form == "pdf" else None
    # TrueType: many journals refuse Type 3, which is matplotlib's default.
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(out, format=form, dpi=130, metadata=metadata)
    return out.getvalue()


def _draw_panel(axes, panel: Panel) -> None:
    for series in panel.series:
        if series.band is not None:
            axes.fill_between(series.x, *series.band, color=series.colour, alpha=0.18, linewidth=0)
        axes.plot(series.x, series.y, **_matplotlib_style(series))
    if panel.baseline is not None:
        axes.axhline(panel.baseline, color=AXIS, linewidth=0.8)
    for name in ("x", "y"):
        axis, (low, high) = getattr(panel, name), extent(panel, name)
        ruler = getattr(axes, f"{name}axis")
        if axis.log:
            getattr(axes, f"set_{name}scale")("log")
            # After the scale, which brings locators of its own, with labels for minor ticks among them.
            values, texts = log_ticks(low, high, axis.form)
            ruler.set_ticks(values, labels=texts)
            ruler.set_ticks([], minor=True)
        else:
            ruler.set_major_locator(MaxNLocator(6))
        # After the ticks, which widen the axis to hold them.
        getattr(axes, f"set_{name}lim")(low, high)
        getattr(axes, f"set_{name}label")(_plain(axis.label), fontsize=9, color=AXIS)
    axes.set_title(_plain(panel.title), fontsize=10, loc="left")
    axes.tick_params(labelsize=8.5, color="#b8bec7")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b8bec7")


def _matplotlib_style(series: Series) -> dict:
    return {
        "color": series.colour,
        "alpha": series.opacity,
        "linestyle": DASHES[series.line] if series.line else "none",
        # From pixels of a page, 96 to the inch, to points, 72.
        "linewidth": series.width * 0.75,
        "marker": "o" if series.marker else None,
        "markersize": 4.5,
        "markerfacecolor": "none" if series.marker == "ring" else series.colour,
    }


def _handles(panels: list[Panel]) -> list[Line2D]:
    return [Line2D([], [], label=_plain(_wrapped(s.name)), **_matplotlib_style(s)) for s in legend(panels)]


def _across(handles: list[Line2D], wide: float) -> int:
    """Columns of a legend, at most 4, whose widest entry leaves them room in ``wide`` inches."""
    lines = [line for handle in handles for line in str(handle.get_label()).splitlines()]
    # Measured before anything is drawn; 72 points are an inch.
    widths = [TextPath((0, 0), line, size=LEGEND_SIZE).get_extents().width / 72 for line in lines]
    return max(1, min(4, len(handles), int(wide / (SWATCH + max(widths, default=1.0)))))


def _legend_of_panel(axes, panel: Panel) -> None:
    """Inside the axes while it is short, else to the right of them: it must not hide the curves."""
    handles = _handles([panel])
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(handles) > FEW_ENTRIES else {}
    axes.legend(handles=handles, fontsize=8, frameon=False, **beside)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, LONGEST))


def _plain(text: str) -> str:
    """Text without matplotlib's mathematical markup."""
    return text.replace("$", "\\$")
