"""Pictures of fits: they hold the data, in both drawings, and are written whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from megamm_laws.fitting.isoflop import fit_isoflops
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.fitting.pictures import colours, isoflop_chart
from megamm_laws.law import power_law
from megamm_laws.pictures.charts import to_pdf, to_png
from megamm_laws.pictures.plots import (
    LOG_A,
    LOG_B,
    PALETTE,
    Budget,
    PlotGroup,
    correlations,
    fit_charts,
    frontiers,
    holdout_chart,
    isoflops,
    residuals,
)
from megamm_laws.pictures.plots import write_charts as write
from megamm_laws.runs.table import read_runs, write_runs

from megamm.errors import InputError
from megamm.report.plotly_charts import to_plotly

ROOT = Path(__file__).parents[2]
LAW = np.array([1.9, 420.0, 0.33, 1500.0, 0.36])


def group(name: str = "early", **changes) -> PlotGroup:
    params, tokens = np.repeat(np.geomspace(1e8, 1e9, 4), 3), np.tile(np.geomspace(1e9, 1e10, 3), 4)
    predicted = power_law.predict(LAW, params, tokens)
    grid = np.geomspace(1e18, 1e20, 16)
    curve = power_law.frontier_loss(LAW, grid)
    rng = np.random.default_rng(0)
    alpha = rng.normal(0.33, 0.02, 400)
    values = {
        "colour": "#0072B2",
        "names": [f"{name}-{i}" for i in range(12)],
        "params": params,
        "tokens": tokens,
        "flops": 6 * params * tokens,
        "losses": predicted * np.linspace(0.98, 1.04, 12),
        "predicted": predicted,
        "grid": grid,
        "frontier": curve,
        "band": np.stack([curve - 0.1, curve + 0.1]),
        "draws": {"alpha": alpha, "beta": rng.normal(0.36, 0.02, 400), LOG_A: -3 * alpha, LOG_B: np.zeros(400)},
        "held_out": (np.array([1e19, 2e19]), np.array([0.01, -0.02])),
        "exponents": (0.52, 0.49),
    }
    return PlotGroup(name=name, **(values | changes))


def traces(panel) -> list:
    return [t for t in to_plotly(panel, 300).data if t.fill is None]


def test_residuals_are_measured_above_the_fit_in_percent():
    chart = residuals([group()])
    assert [panel.x.label for panel in chart.panels] == ["parameters", "training tokens", "training compute (FLOPs)"]
    for panel, column in zip(chart.panels, ("params", "tokens", "flops")):
        (trace,) = traces(panel)
        np.testing.assert_allclose(trace.y, np.linspace(-2, 4, 12), atol=1e-5)
        np.testing.assert_allclose(trace.x, getattr(group(), column), rtol=1e-5)


def test_frontiers_have_runs_and_bands_of_every_group():
    chart = frontiers([group(), group("late", colour="#D55E00")])
    figure = to_plotly(chart.panels[0], 300)
    assert sum(trace.fill == "toself" for trace in figure.data) == 2
    points = [t for t in figure.data if t.mode == "markers"]
    assert [len(t.x) for t in points] == [12, 12] and "early-0" in points[0].text[0]
    band = next(t for t in figure.data if t.fill == "toself")
    np.testing.assert_allclose(band.y[:16], group().band[1], rtol=1e-5)


def test_correlations_state_r_and_survive_a_constant():
    panels = correlations([group()]).panels
    assert panels[1].title.endswith("r = -1.000") and "r =" not in panels[2].title
    assert len(traces(panels[0])[0].x) == 300


def test_amplitudes_are_named_by_where_they_are_taken():
    panels = correlations([group()]).panels
    assert [p.y.label for p in panels] == ["beta", "log A at mean N", "log B at mean D"]


def test_legends_stay_inside_the_picture_and_off_the_curves(tmp_path, monkeypatch):
    """Many groups of long names: no legend leaves the figure, none lies on a panel of many curves."""
    monkeypatch.setattr("megamm_laws.pictures.charts.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    drawn = []
    to_png(frontiers([group(f"{i}-" + "long-name-" * (3 + 4 * (i == 3))) for i in range(9)]))
    params, losses = np.geomspace(1e8, 1e9, 5), np.linspace(3, 2, 5)
    budget = {"params": params, "losses": losses, "grid": params, "curve": losses, "optimum": (2e8, 2.5)}
    to_png(isoflops("isoflops", [Budget(flops=10.0**e, **budget) for e in range(10, 35)], 1e-2, 0.5))
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
    (legend,) = drawn[0].legends
    box = legend.get_window_extent()
    assert drawn[0].bbox.x0 <= box.x0 and box.x1 <= drawn[0].bbox.x1
    axes = drawn[1].axes[0]
    assert len(axes.get_legend().get_texts()) <= 9
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


def test_many_groups_have_different_colours():
    names = [str(i) for i in range(30)]
    assert len(set(colours(names).values())) == 30
    assert list(colours(names).values())[:7] == [colour.lower() for colour in PALETTE]


def test_hold_out_shows_errors_and_drift():
    (trace,) = traces(holdout_chart([group(), group("late", held_out=None)]).panels[0])
    assert list(trace.y) == [1.0, -2.0] and trace.name == "early: 2 runs, a 0.490 without them, 0.520 with"


def test_charts_without_data_are_left_out():
    assert [c.name for c in fit_charts([group()])] == ["frontiers", "residuals", "correlations", "holdout"]
    assert [c.name for c in fit_charts([group(draws={}, held_out=None)])] == ["frontiers", "residuals"]


def test_isoflops_line_passes_through_exact_optima():
    budgets = []
    for flops in (1e18, 1e19, 1e20):
        best = float(power_law.optimum(LAW, np.array([flops]))[0][0])
        params = best * np.geomspace(0.2, 5, 7)
        losses = power_law.predict(LAW, params, flops / 6 / params)
        interval = (best / 1.1, best * 1.1)
        budgets.append(
            Budget(
                flops=flops,
                params=params,
                losses=losses,
                grid=params,
                curve=losses,
                optimum=(best, losses.min()),
                interval=interval,
            )
        )
    budgets.append(
        Budget(flops=1e21, params=params, losses=losses, grid=params, curve=losses, optimum=None)  # minimum at the edge
    )
    a = LAW[4] / (LAW[2] + LAW[4])
    chart = isoflops("isoflops", budgets, budgets[0].optimum[0] / 1e18**a, a)
    left, right = chart.panels
    assert sum(t.mode == "markers" and len(t.x) == 7 for t in traces(left)) == 4
    line, points = traces(right)[-1], traces(right)[-2]
    assert len(points.x) == 3 and line.name == f"N* ~ C^{a:.4f}"
    np.testing.assert_allclose(np.interp(np.log(points.x), np.log(line.x), np.log(line.y)), np.log(points.y), rtol=1e-4)
    assert to_png(chart).startswith(b"\x89PNG")


def isoflop_rows() -> list[dict]:
    """Three budgets of seven sizes around the optimum of LAW, without noise."""
    rows = []
    for flops in (1e18, 1e19, 1e20):
        best = float(power_law.optimum(LAW, np.array([flops]))[0][0])
        for n in best * np.geomspace(0.2, 5, 7):
            loss = float(power_law.predict(LAW, np.array([n]), np.array([flops / 6 / n]))[0])
            rows.append({"run": f"{flops:g}-{n:g}", "architecture": "early", "params": n, "tokens": flops / 6 / n})
            rows[-1] |= {"flops": flops, "loss": loss}
    return rows


def test_chart_of_an_isoflop_fit(tmp_path):
    write_runs(tmp_path / "runs.csv", isoflop_rows())
    fit = fit_isoflops(read_runs(tmp_path / "runs.csv"), group="early", noise=1e-4, draws=50)
    left, right = isoflop_chart(fit, "isoflop_0", "early fusion").panels
    assert left.title == "early fusion: loss over size at equal compute"
    optima = power_law.optimum(LAW, np.array([1e18, 1e19, 1e20]))[0]
    np.testing.assert_allclose(traces(right)[-2].y, optima, rtol=0.03)


def test_files_are_pdf_and_png_and_the_same_each_time(tmp_path):
    charts = fit_charts([group()])
    written = write(tmp_path, charts)
    assert {p.name for p in written} == {f"{c.name}.{kind}" for c in charts for kind in ("png", "pdf")}
    assert (tmp_path / "residuals.pdf").read_bytes() == to_pdf(charts[1])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; --out names a folder"):
        write(tmp_path / "file", charts)


def test_tool(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"run": f"r{i}", "architecture": "early", "params": n, "tokens": d}
        for i, (n, d) in enumerate((n, d) for n in np.geomspace(1e8, 2e9, 5) for d in np.geomspace(1e9, 5e10, 4))
    ]
    for row in rows:
        row["loss"] = power_law.predict(LAW, np.array([row["params"]]), np.array([row["tokens"]]))[0] * np.exp(
            rng.normal(0, 1e-3)
        )
    write_runs(tmp_path / "runs.csv", rows)
    write_fits(tmp_path / "fits", fit_table(read_runs(tmp_path / "runs.csv"), resamples=50))
    command = [sys.executable, str(ROOT / "tools" / "plot_fits.py"), str(tmp_path / "fits")]

    def run(*rest) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *map(str, rest)], capture_output=True, text=True)

    done = run("--runs", tmp_path / "runs.csv", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {p.stem for p in (tmp_path / "out").iterdir()} == {"frontiers", "residuals", "correlations", "holdout"}
    done = run("--runs", tmp_path / "runs.csv", "--out", tmp_path / "none", "--loss", "loss_text")
    assert done.returncode == 2 and "no fit of loss_text" in done.stderr and not (tmp_path / "none").exists()
