"""The page: sections in the order in which a decision is made. All text from the study is escaped."""

import base64
import gzip
import io
import json
from html import escape

from megamm_laws.pictures.charts import Chart, Panel, Series, legend
from megamm_laws.pictures.units import count, duration, power, prettify
from PIL import Image
from plotly.offline import get_plotlyjs

from megamm.report.findings import Finding
from megamm.report.plotly_charts import to_plotly
from megamm.report.sample_rows import data_uri
from megamm.report.study import StudyResults
from megamm.report.style import CSS, DRAW, PRINT, SORT
from megamm.report.tables import (
    comparison_table,
    fits_table,
    forecasts_table,
    image_table,
    note,
    optimum_table,
    runs_table,
    versions_table,
)

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser enforces that the page loads nothing."""
STILL_WIDTH = 800
"""Pixels of a chart's picture in the page; the full one lies beside it."""
CAUTIONS = 3
"""Warnings told beside the verdict."""


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
        ("sizes", "How large, and for how long", optimum_table(study)),
        ("forecasts", "Forecasts and what came out", forecasts_table(study)),
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
    verdict = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences) + _cautions(study)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(study.name)}: scaling report</title>
<link rel="icon" href="data:,"><style>{CSS}</style>
</head><body>
<header><h1>{escape(study.name)}</h1><div class="subtitle">Scaling study of native multimodal models</div>
<nav aria-label="Contents">{links}</nav></header>
<main><div class="verdict" role="note" aria-label="Verdict">{verdict}</div>{_tiles(study)}{body}</main>
<footer>Losses are cross entropies in nats per text token. Brackets hold 95% intervals.</footer>
<script id="plotly" type="application/gzip">{_packed_plotly()}</script>
<script>{DRAW}{SORT}{PRINT}</script></body></html>
"""


# ----------------------------------------------------------------------------------------------- the start


def _packed_plotly() -> str:
    """plotly.js, compressed: a third of its size, which makes the page fit into an e-mail."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _cautions(study: StudyResults) -> str:
    """The gravest warnings about the fits behind the verdict, in words, and how many more there are."""
    pair = study.pair or study.groups
    behind = [f for f in study.fits if f["group"] in pair and f.get("loss_column", "loss") == "loss"]
    texts = list(dict.fromkeys(prettify(text) for fit in behind for text in fit.get("warnings", [])))
    if not texts:
        return ""
    first = "".join(f"<li>{escape(text[0].upper() + text[1:])}.</li>" for text in texts[:CAUTIONS])
    more = f"{len(texts) - CAUTIONS} more" if len(texts) > CAUTIONS else "All"
    link = f'<a href="#constants">{more}, with the fits that they are about</a>'
    return f'<p class="note">Read with care:</p><ul class="plain note">{first}<li>{link}</li></ul>'


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
    caption = escape(chart.caption)
    # For who has no scripts, or a browser too old to unpack them; hidden once the chart is drawn.
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((STILL_WIDTH, STILL_WIDTH))
    still = f'<img class="still" src="{data_uri(picture, colours=32)}" alt="{caption}">'
    return (
        f'<figure aria-label="{caption}">{shared}<div class="panels" style="--columns:{columns}">{panels}</div>'
        f"{still}<figcaption>{caption}</figcaption></figure>"
    )


def _panel(chart: Chart, index: int, panel: Panel) -> str:
    figure = to_plotly(panel, chart.height).to_plotly_json()
    # Within a script element nothing but its own end tag has a meaning.
    values = json.dumps({"data": figure["data"], "layout": figure["layout"]}).replace("</", "<\\/")
    plot = f'<div class="plot" id="{chart.name}-{index}" style="height:{chart.height}px"></div>'
    plot += f'<script type="application/json" class="figure">{values}</script>'
    title = f"<h3>{escape(panel.title)}</h3>" if panel.title else ""
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
