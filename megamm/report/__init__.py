"""The report of a study: one HTML page that needs no network, PNG plots and a summary."""

import shlex
import shutil
import tempfile
from pathlib import Path

from megamm_laws.pictures.charts import to_png

from megamm.errors import InputError
from megamm.files import write_json, write_text
from megamm.report.figures import all_charts
from megamm.report.findings import findings, headline
from megamm.report.page import render_page
from megamm.report.sample_rows import sample_rows
from megamm.report.study import read_results


def render_report(study_dir: Path | str, out: Path | str | None = None) -> tuple[Path, str]:
    """Write ``out``/index.html (default STUDY_DIR/report), a PNG per chart and row, and summary.json.

    Everything is drawn before the first file is written. Returns the page's path and the verdict.

    Raises:
        InputError: runs, runs.csv or fits are missing or damaged, or ``out`` is a file.
    """
    study = read_results(study_dir)
    out = Path(out) if out else Path(study_dir) / "report"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; --out names a folder")
    found = findings(study)
    sentences = headline(study, found)
    charts = all_charts(study, found[0].comparison if found else None)
    pngs = {name: to_png(chart) for name, chart in charts.items()}
    samples = sample_rows(study)
    page = render_page(
        study,
        sentences=sentences,
        found=found,
        charts=charts,
        pngs=pngs,
        samples=samples,
        commands=_commands(study.folder, out),
    )
    summary = {
        "verdict": sentences[0],
        "sentences": sentences,
        "runs": len(study.cooled),
        "flops": study.flops,
        "comparisons": [
            {
                "loss": f.subject,
                **{k: " ".join(getattr(f, k)).strip() for k in ("difference", "gain", "crossover")},
                "verdict": f.verdict,
            }
            for f in found
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    # Drawn beside their places and then moved there, so that no plot is ever half-written.
    with tempfile.TemporaryDirectory(dir=out) as name:
        for chart, png in pngs.items():
            (Path(name) / f"{chart}.png").write_bytes(png)
        for i, picture in enumerate(samples[0].values(), start=1):
            picture.save(Path(name) / f"row-{i}.png")
        for file in sorted(Path(name).iterdir()):
            shutil.move(file, out / file.name)
    write_json(out / "summary.json", summary)
    # Last: a page that is there has its plots and its summary beside it.
    write_text(out / "index.html", page)
    return out / "index.html", sentences[0]


def _commands(folder: Path, out: Path) -> list[str]:
    """The commands from the study's settings to this page."""
    study, table, fits = (shlex.quote(str(p)) for p in (folder, folder / "runs.csv", folder / "fits"))
    return [
        f"python tools/run_study.py {shlex.quote(str(folder / 'study.yaml'))} --out {study}",
        f"python tools/collect_runs.py {study} --out {table}",
        f"python tools/fit_scaling_laws.py {table} --out {fits} --group-by architecture --losses all",
        f"python tools/render_report.py {study} --out {shlex.quote(str(out))}",
    ]
