"""Charts drawn by plotly, for the page."""

import html
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from megamm_laws.pictures.charts import AXIS, FONT, GRID, Panel, Series, extent
from megamm_laws.pictures.units import log_ticks


def to_plotly(panel: Panel, height: int) -> go.Figure:
    """One panel as a plotly figure without a legend; all text is escaped."""
    figure = go.Figure()
    for series in panel.series:
        if series.band is not None:
            # First, so that the line lies over it.
            figure.add_trace(_plotly_band(series))
        figure.add_trace(_plotly_trace(series))
    if panel.baseline is not None:
        figure.add_hline(panel.baseline, line={"color": AXIS, "width": 1})
    figure.update_layout(
        template="none",  # plotly's own is ten times as long as the rest
        height=height,
        margin={"l": 58, "r": 14, "t": 8, "b": 46},
        showlegend=False,
        hovermode="closest",
        paper_bgcolor="white",
        plot_bgcolor="white",
        font={"family": FONT, "size": 12, "color": "#1f2430"},
        hoverlabel={"bgcolor": "white", "font": {"family": FONT, "size": 12}},
    )
    for name in ("x", "y"):
        axis, (low, high) = getattr(panel, name), extent(panel, name)
        settings = {
            "title": {"text": html.escape(axis.label), "font": {"size": 12, "color": AXIS}, "standoff": 8},
            "gridcolor": GRID,
            "linecolor": "#b8bec7",
            "showline": True,
            "ticks": "outside",
            "ticklen": 4,
            "tickcolor": "#b8bec7",
            "zeroline": False,
            "range": [low, high],
        }
        if axis.log:
            values, texts = log_ticks(low, high, axis.form)
            settings |= {"type": "log", "range": [math.log10(low), math.log10(high)]}
            settings |= {"tickvals": values, "ticktext": texts}
        else:
            settings |= {"nticks": 6}
        figure.update_layout({f"{name}axis": settings})
    return figure


def _plotly_trace(series: Series) -> go.Scatter:
    modes = (["lines"] if series.line else []) + (["markers"] if series.marker else [])
    return go.Scatter(
        x=_floats(series.x),
        y=_floats(series.y),
        mode="+".join(modes),
        name=html.escape(series.name),
        opacity=series.opacity,
        line={"color": series.colour, "width": series.width, "dash": series.line or "solid"},
        marker={"color": series.colour, "size": 7, "symbol": "circle-open" if series.marker == "ring" else "circle"},
        text=[html.escape(t).replace("\n", "<br>") for t in series.hover] if series.hover else None,
        hovertemplate="%{text}<extra></extra>" if series.hover else "%{y:.4g}",
    )


def _plotly_band(series: Series) -> go.Scatter:
    x, (low, high) = np.asarray(series.x, float), series.band
    return go.Scatter(
        # Along the upper edge and back along the lower one: a closed outline to be filled.
        x=_floats([*x, *x[::-1]]),
        y=_floats([*high, *low[::-1]]),
        fill="toself",
        fillcolor=_faint(series.colour),
        line={"width": 0},
        hoverinfo="skip",
        mode="lines",
    )


def _faint(colour: str, opacity: float = 0.18) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _floats(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Plain lists at six significant digits keep the page small and its text readable."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]
