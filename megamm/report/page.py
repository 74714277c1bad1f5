"""The page: sections in the order in which a decision is made. All text from the study is escaped."""

import base64
from html import escape

import plotly.io
from megamm_laws.pictures.charts import Chart, Panel, Series, legend
from megamm_laws.pictures.units import count, duration, power
from PIL import Image
from plotly.offline import get_plotlyjs

from megamm.report.findings import Finding
from megamm.report.plotly_charts import to_plotly
from megamm.report.sample_rows import data_uri
from megamm.report.study import StudyResults
from megamm.report.style import CSS, SORT
from megamm.report.tables import comparison_table, fits_table, image_table, note, runs_table, versions_table

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser enforces that the page loads nothing."""


def render_page(
    study: StudyResults,
    *,
    sentences: list[str],
    found: list[Finding],
    charts: dict[str, Chart],
    pngs: dict[str, bytes],
    samples: tuple[dict[int, Image.Image], str],
    commands: list[str],
) -> str:
    """The whole HTML document."""

    def chart(name: str) -> str:
        return _chart(charts[name], pngs[name]) if name in charts else ""

    images = image_table(study) + chart("image_use") if "image_use" in charts else ""
    profiles = "".join(chart(name) for name in charts if name.startswith("isoflop_"))
    diagnostics = "".join(chart(name) for name in ("residuals", "correlations", "holdout"))
    sections = [
        ("frontiers", "Loss against compute", chart("frontier") + chart("frontier_by_source") + profiles),
        ("lead", "Who is ahead, and by how much", comparison_table(found) + chart("lead") if found else ""),
        ("constants", "Fitted constants", fits_table(study) + diagnostics),
        ("training", "Training loss", chart("training")),
        ("validation", "Validation loss of each source", chart("validation")),
        ("images", "Do the models use their images?", images),
        ("runs", "Runs", runs_table(study)),
        ("rows", "What the model sees", _samples(*samples)),
        ("made", "How it was made", _made(study, commands)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in sections)
    body = "".join(f'<section id="{a}"><h2>{escape(title)}</h2>{content}</section>' for a, title, content in sections)
    verdict = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences) + _caution_line(study)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(study.name)}: scaling report</title>
<link rel="icon" href="data:,"><style>{CSS}</style>
<script>{get_plotlyjs()}</script></head><body>
<header><h1>{escape(study.name)}</h1><div class="subtitle">Scaling study of native multimodal models</div>
<nav aria-label="Contents">{links}</nav></header>
<main><div class="verdict" role="note" aria-label="Verdict">{verdict}</div>{_tiles(study)}{body}</main>
<footer>Losses are cross entropies in nats per text token. Brackets hold 95% intervals.</footer>
<script>{SORT}</script></body></html>
"""


# ----------------------------------------------------------------------------------------------- the start


def _caution_line(study: StudyResults) -> str:
    pair = study.pair or study.groups
    behind = [f for f in study.fits if f["group"] in pair and f.get("loss_column", "loss") == "loss"]
    number = sum(len(fit.get("warnings", [])) for fit in behind)
    if not number:
        return ""
    verb = "is 1 warning" if number == 1 else f"are {number} warnings"
    link = '<a href="#constants">listed below</a>'
    return f'<p class="note">Read with care: there {verb} about the fits behind this verdict, {link}.</p>'


def _tiles(study: StudyResults) -> str:
    trunks = sum(run.is_trunk for run in study.finished)
    unfinished = len(study.runs) - len(study.finished)
    details = [f"{trunks} trunks"] * bool(trunks) + [f"{unfinished} unfinished"] * bool(unfinished)
    params = [run.params for run in study.finished]
    tokens = [run.result["tokens"] for run in study.cooled] or [run.result["tokens"] for run in study.finished]
    devices = sorted({str(run.about.get("device", "unknown")) for run in study.runs})
    ranks = sorted({int(run.about.get("world_size", 1)) for run in study.runs})
    span = "–".join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))
    tiles = [
        (str(len(study.cooled)), "finished runs" + (f", {', '.join(details)}" if details else "")),
        (power(study.flops), "FLOPs spent in training"),
        (f"{count(min(params))}–{count(max(params))}", "parameters"),
        (f"{count(min(tokens))}–{count(max(tokens))}", "training tokens of a run"),
        (duration(sum(run.seconds for run in study.runs)), "training time, summed over runs"),
        (", ".join(devices), f"device, {span} process{'es' * (ranks[-1] > 1)} a run"),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in tiles
        )
        + "</div>"
    )


# ------------------------------------------------------------------------------------------------- charts


def _chart(chart: Chart, png: bytes) -> str:
    shared = "" if chart.legend_per_panel else _legend(chart.panels)
    panels = "".join(_panel(chart, i, panel) for i, panel in enumerate(chart.panels))
    columns = min(chart.columns, len(chart.panels))
    caption, image = escape(chart.caption), base64.b64encode(png).decode()
    fallback = f'<img style="max-width:100%" src="data:image/png;base64,{image}" alt="{caption}">'
    return (
        f'<figure aria-label="{caption}">{shared}<div class="panels" style="--columns:{columns}">{panels}</div>'
        f"<noscript>{fallback}</noscript><figcaption>{caption}</figcaption></figure>"
    )


def _panel(chart: Chart, index: int, panel: Panel) -> str:
    plot = plotly.io.to_html(
        to_plotly(panel, chart.height),
        full_html=False,
        include_plotlyjs=False,
        div_id=f"{chart.name}-{index}",
        config={"displayModeBar": False, "responsive": True},
        default_width="100%",
        default_height=f"{chart.height}px",
    )
    title = f"<h4>{escape(panel.title)}</h4>" if panel.title else ""
    own = _legend([panel]) if chart.legend_per_panel else ""
    return f'<div class="panel">{title}{own}{plot}</div>'


def _legend(panels: list[Panel]) -> str:
    items = "".join(f"<li>{_swatch(series)}{escape(series.name)}</li>" for series in legend(panels))
    return f'<ul class="legend">{items}</ul>'


def _swatch(series: Series) -> str:
    """A short piece of the line, as the plot draws it."""
    colour, dash = series.colour, {"dot": "2 3", "dash": "6 3"}.get(series.line or "", "none")
    marks = ""
    if series.band is not None:
        marks += f'<rect width="26" height="12" fill="{colour}" opacity=".18"/>'
    if series.line:
        stroke = f'stroke="{colour}" stroke-width="{series.width}" stroke-dasharray="{dash}"'
        marks += f'<line x1="0" y1="6" x2="26" y2="6" {stroke}/>'
    if series.marker:
        fill = "white" if series.marker == "ring" else colour
        marks += f'<circle cx="13" cy="6" r="3.5" fill="{fill}" stroke="{colour}"/>'
    return f'<svg width="26" height="12" aria-hidden="true" opacity="{max(series.opacity, 0.7)}">{marks}</svg>'


# ------------------------------------------------------------------------------------------------ the rest


def _samples(pictures: dict[int, Image.Image], source: str) -> str:
    if not pictures:
        return note(source)
    explained = (
        f"{source} Each box is a document. Text tokens on blue carry a loss; the others are only read. A picture is "
        "the grid of its patches, each of them one position."
    )
    content = note(explained)
    for row, picture in pictures.items():
        size = f'width="{picture.width // 2}" height="{picture.height // 2}"'
        alt = f"Packed row {row}: its documents with image patches and text tokens, and its attention mask"
        image = f'<img loading="lazy" src="{data_uri(picture)}" {size} alt="{alt}">'
        content += f'<div class="sample"><h3>Row {row}</h3>{image}</div>'
    return content


def _made(study: StudyResults, commands: list[str]) -> str:
    content = versions_table(study) + f"<h3>Commands</h3><pre>{escape(chr(10).join(commands))}</pre>"
    path = study.folder / "study.yaml"
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        content += f"<details><summary>study.yaml</summary><pre>{escape(text)}</pre></details>"
    return content
