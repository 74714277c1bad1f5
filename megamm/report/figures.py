"""The charts of a study."""

from collections.abc import Iterable

import numpy as np
from megamm_laws.comparison.compare import Comparison
from megamm_laws.comparison.outputs import lead_chart
from megamm_laws.comparison.recounted import runs_of
from megamm_laws.fitting.fit import distinct
from megamm_laws.fitting.isoflop import fit_isoflops
from megamm_laws.fitting.pictures import group_of, isoflop_chart
from megamm_laws.pictures.charts import Chart, ChartAxis, Panel, Series, padded
from megamm_laws.pictures.plots import fit_charts
from megamm_laws.pictures.units import count, digits, power

from megamm.errors import InputError
from megamm.report.study import BLIND, StudyResults, TrainedRun

COLOURS = {"early": "#0072B2", "late": "#D55E00", "text": "#7a8089"}
"""Of each architecture, everywhere; told apart by colour-blind readers (Okabe and Ito)."""
OTHER_COLOURS = ("#009E73", "#CC79A7", "#B8860B", "#56B4E9")
NAMES = {"early": "early fusion", "late": "late fusion", "text": "text only (blind)"}
POINTS = 300
ISOFLOP_DRAWS = 400


def colour_of(study: StudyResults, group: str) -> str:
    """The group's colour."""
    others = [g for g in study.groups if g not in COLOURS]
    return COLOURS.get(group) or OTHER_COLOURS[others.index(group) % len(OTHER_COLOURS) if group in others else 0]


def title_of(group: str) -> str:
    """The group as people call it."""
    return NAMES.get(group, group)


def column_name(column: str) -> str:
    """``loss`` is the average over sources, ``loss_caption`` that of captions."""
    return "average of sources" if column == "loss" else column.removeprefix("loss_")


def shade(colour: str, strength: float) -> str:
    """A colour mixed with white; ``strength`` 1 leaves it, 0 makes it pale."""
    keep = 0.38 + 0.62 * strength
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (part - 255) * keep):02x}" for part in parts)


def strengths(values: Iterable[float]) -> dict[float, float]:
    """A strength for each distinct value, the largest 1."""
    ordered = sorted(set(values))
    return {v: i / max(1, len(ordered) - 1) if len(ordered) > 1 else 1.0 for i, v in enumerate(ordered)}


def all_charts(study: StudyResults, comparison: Comparison | None) -> dict[str, Chart]:
    """Every chart for which the study has data, by name."""
    charts = [frontier(study), *frontiers_by_source(study)]
    if comparison is not None:
        charts.append(lead_chart("lead", comparison, (title_of(comparison.first), title_of(comparison.second))))
    charts += [
        *isoflop_profiles(study),
        *fit_diagnostics(study),
        *training(study),
        *validation(study),
        *image_use(study),
    ]
    return {chart.name: chart for chart in charts}


# ------------------------------------------------------------------------------------------------ frontiers


def frontier(study: StudyResults) -> Chart:
    """Average loss against compute."""
    return Chart(
        name="frontier",
        caption="Each point is a finished run, thin lines join runs of one size. The thick line is the fitted "
        "frontier, the lowest loss that a budget can buy; its shade is the 95% band.",
        panels=[_frontier_panel(study, "loss", "")],
        columns=1,
        height=430,
    )


def frontiers_by_source(study: StudyResults) -> list[Chart]:
    """The same for each source, where it was fitted."""
    columns = [c for c in study.loss_columns if c != "loss"]
    if not columns:
        return []
    return [
        Chart(
            name="frontier_by_source",
            caption="As above, for the validation loss of each source.",
            panels=[_frontier_panel(study, c, column_name(c)) for c in columns],
        )
    ]


def _frontier_panel(study: StudyResults, column: str, title: str) -> Panel:
    series = []
    # The blind baseline is no competitor, unless the study has nothing else.
    seeing = [g for g in study.groups if g != BLIND] or study.groups
    for group in seeing:
        table, colour = study.rows_of(group), colour_of(study, group)
        table = table.select(np.isfinite(table.numbers(column)))
        if not len(table):
            continue
        params, flops, losses = (table.numbers(c) for c in ("params", "flops", column))
        labels = distinct(params)
        for size in range(labels.max() + 1):
            chosen = np.flatnonzero(labels == size)
            chosen = chosen[np.argsort(flops[chosen])]
            hover = [
                f"{table.names[i]}\n{count(params[i])} parameters, {count(table.rows[i]['tokens'])} tokens\n"
                f"{power(flops[i])} FLOPs, loss {losses[i]:.3f}"
                for i in chosen
            ]
            series.append(
                Series(
                    name=f"{title_of(group)}, runs",
                    x=flops[chosen],
                    y=losses[chosen],
                    colour=colour,
                    width=1,
                    marker="dot",
                    opacity=0.45,
                    hover=hover,
                )
            )
    for group in seeing:
        law = study.laws.get(column, {}).get(group)
        if law is None:
            continue
        grid = np.geomspace(*law.flops_range, 96)
        series.append(
            Series(
                name=f"{title_of(group)}, frontier",
                x=grid,
                y=law.frontier(grid),
                colour=colour_of(study, group),
                width=3,
                band=law.band(grid),
            )
        )
    x = ChartAxis(label="training compute (FLOPs)", log=True, form=power)
    lines = [s for s in series if s.band is not None]
    low, high = padded(np.concatenate([np.asarray(s.y, float) for s in series]), log=False)
    if lines:  # a wide band at the far end must not squeeze the points
        low = max(min(low, min(float(s.band[0].min()) for s in lines)), low - 0.3 * (high - low))
    return Panel(title=title, x=x, y=ChartAxis(label="loss (nats per token)", range=(low, high)), series=series)


def isoflop_profiles(study: StudyResults) -> list[Chart]:
    """Loss over size at equal compute, for each group whose runs have budgets in common; most ladders have none."""
    charts: list[Chart] = []
    for group in study.groups:
        runs = runs_of(study.table, study.group_column, group)
        try:
            fit = fit_isoflops(runs, group=group, draws=ISOFLOP_DRAWS)
        except InputError:
            continue
        charts.append(isoflop_chart(fit, f"isoflop_{len(charts)}", title_of(group)))
    return charts


def fit_diagnostics(study: StudyResults) -> list[Chart]:
    """Residuals, correlations and hold-out of the fits of the average loss."""
    groups = []
    entries = {fit["group"]: fit for fit in study.fits if fit.get("loss_column", "loss") == "loss"}
    for name, law in study.laws.get("loss", {}).items():
        runs = runs_of(study.table, study.group_column, name)
        groups.append(group_of(law, runs, "loss", entries[name], name=title_of(name), colour=colour_of(study, name)))
    return fit_charts(groups)[1:] if groups else []


# ------------------------------------------------------------------------------------------------- training


def training(study: StudyResults) -> list[Chart]:
    """Training loss against tokens."""
    groups = list(dict.fromkeys(run.architecture for run in study.runs if run.records))
    if not groups:
        return []
    limits = padded(np.array([r["loss"] for run in study.runs for r in run.records]), log=True)
    panels = []
    for group in sorted(groups, key=lambda g: (g == BLIND, g)):
        runs = [run for run in study.runs if run.architecture == group and run.records]
        strength = strengths(run.width for run in runs)
        series = []
        for run in sorted(runs, key=lambda r: (r.width, not r.is_trunk)):
            branch = bool(run.config["train"].get("branch_from"))
            records = _thin(run.records)
            series.append(
                Series(
                    name=f"width {run.width} ({count(run.params)})",
                    x=[r["tokens"] for r in records],
                    y=[r["loss"] for r in records],
                    colour=shade(colour_of(study, group), strength[run.width]),
                    line="dot" if branch else "solid",
                    width=1.4 if branch else 1.8,
                    legend=not branch,
                    hover=[f"{run.path.name}\n{count(r['tokens'])} tokens, loss {r['loss']:.3f}" for r in records],
                )
            )
        # Branches stand for themselves where no trunk of theirs is shown.
        if not any(s.legend for s in series):
            for s in series:
                s.legend = True
        y = ChartAxis(label="training loss (nats per token)", log=True, range=limits)
        panels.append(Panel(title=title_of(group), x=_tokens_axis(), y=y, series=series))
    caption = (
        "Means over the steps between two log lines. Solid: constant learning rate (trunks), or runs without one. "
        "Dotted: branches whose learning rate is cooled down; their final losses are what the laws are fitted to."
    )
    return [Chart(name="training", caption=caption, panels=panels, legend_per_panel=True, height=340)]


def _thin(records: list[dict]) -> list[dict]:
    """At most POINTS records, evenly spaced in log step."""
    if len(records) <= POINTS:
        return records
    keep = np.unique(np.geomspace(1, len(records), POINTS).round().astype(int) - 1)
    return [records[i] for i in keep]


def _tokens_axis() -> ChartAxis:
    return ChartAxis(label="training tokens", log=True, form=count)


# ----------------------------------------------------------------------------------------------- validation


def validation(study: StudyResults) -> list[Chart]:
    """Final validation loss of each source against tokens (top) and parameters (bottom)."""
    runs = [run for run in study.cooled if run.architecture != BLIND] or study.cooled
    if not runs:
        return []
    lengths = dict(zip((id(r) for r in runs), distinct(np.array([r.result["tokens"] for r in runs], float))))
    panels = []
    for axis, x_of, line_of in (
        (_tokens_axis(), lambda r: r.result["tokens"], lambda r: r.width),
        (_params_axis(), lambda r: r.params, lambda r: int(lengths[id(r)])),
    ):
        for source in study.sources:
            y = ChartAxis(label=f"{source} loss (nats per token)")
            title = f"{source}, against {'tokens' if axis.label.endswith('tokens') else 'parameters'}"
            panels.append(Panel(title=title, x=axis, y=y, series=_lines(study, runs, source, x_of, line_of)))
    caption = (
        "Final validation losses. Against tokens a line is one model width, against parameters one training "
        "length; darker is larger or longer."
    )
    columns = min(3, max(1, len(study.sources)))
    return [Chart(name="validation", caption=caption, panels=panels, columns=columns)]


def _params_axis() -> ChartAxis:
    return ChartAxis(label="parameters", log=True, form=count)


def _lines(study: StudyResults, runs: list[TrainedRun], source: str, x_of, line_of) -> list[Series]:
    """A line per architecture and value of ``line_of``, darker for larger values."""
    series = []
    for group in sorted({run.architecture for run in runs}):
        own = [run for run in runs if run.architecture == group and source in run.result["losses"]]
        strength = strengths(line_of(run) for run in own)
        for value in sorted(strength, reverse=True):
            line = sorted((run for run in own if line_of(run) == value), key=x_of)
            series.append(
                Series(
                    name=title_of(group),
                    x=[x_of(r) for r in line],
                    y=[r.result["losses"][source]["loss"] for r in line],
                    colour=shade(colour_of(study, group), strength[value]),
                    width=1.5,
                    marker="dot",
                    hover=[
                        f"{r.result['name']}\n{count(r.params)} parameters, {count(r.result['tokens'])} tokens\n"
                        f"loss {r.result['losses'][source]['loss']:.3f}"
                        for r in line
                    ],
                )
            )
    return series


# ------------------------------------------------------------------------------------------------ image use


def loss_after_image(losses: dict[str, float]) -> float:
    """Loss of the text that follows an image; of all text where it is not split up."""
    return losses.get("text_after_image", losses["loss"])


def image_sources(study: StudyResults) -> list[str]:
    """Sources that were also evaluated on swapped images."""
    return list(dict.fromkeys(s for run in study.cooled for s in run.result.get("losses_swapped") or {}))


def longest(study: StudyResults, group: str) -> list[TrainedRun]:
    """The longest finished run of each size, smallest first."""
    runs = sorted((r for r in study.cooled if r.architecture == group), key=lambda r: (r.params, r.result["tokens"]))
    return list({run.width: run for run in runs}.values())


def image_use(study: StudyResults) -> list[Chart]:
    """Loss of the text after images: as they are, swapped, and for a blind model."""
    sources = image_sources(study)
    groups = sorted({run.architecture for run in study.cooled}, key=lambda g: (g == BLIND, g))
    panels = []
    for source in sources:
        series = []
        for group in groups:
            runs = [r for r in longest(study, group) if source in r.result["losses"]]
            colour, params = colour_of(study, group), [r.params for r in runs]
            true = [loss_after_image(r.result["losses"][source]) for r in runs]
            series.append(_use(title_of(group), params, true, colour, "solid", "dot"))
            swapped = [r for r in runs if source in (r.result.get("losses_swapped") or {})]
            if group != BLIND and swapped:
                losses = [loss_after_image(r.result["losses_swapped"][source]) for r in swapped]
                name = f"{title_of(group)}, images swapped"
                series.append(_use(name, [r.params for r in swapped], losses, colour, "dash", "ring"))
        y = ChartAxis(label="loss after an image (nats per token)")
        panels.append(Panel(title=source, x=_params_axis(), y=y, series=series))
    caption = (
        "Loss of text that follows an image, for the longest run of each size. A model that reads its images is "
        "better than the blind one, and worse off when each image is replaced by another."
    )
    return [Chart(name="image_use", caption=caption, panels=panels, columns=2)] if panels else []


def _use(name: str, params: list[float], losses: list[float], colour: str, line: str, marker: str) -> Series:
    hover = [f"{name}\n{count(p)} parameters\nloss {digits(v)}" for p, v in zip(params, losses)]
    return Series(name=name, x=params, y=losses, colour=colour, line=line, marker=marker, hover=hover)
