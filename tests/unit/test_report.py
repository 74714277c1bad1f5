"""The report of a study whose losses follow known laws."""

import base64
import gzip
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from megamm_laws.comparison.compare import compare, verdict
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.forecasts.forecast import PlannedRun, make_forecast, score_forecast
from megamm_laws.law import power_law
from megamm_laws.pictures import units
from megamm_laws.pictures.charts import extent, to_png
from megamm_laws.runs.collect import collect
from megamm_laws.runs.table import read_runs, write_runs
from PIL import Image
from study_factory import COOLDOWN, LAWS, make_datasets, make_study

from megamm.errors import InputError
from megamm.files import write_json
from megamm.report import render_report
from megamm.report.figures import all_charts, shade
from megamm.report.findings import cautions, findings, headline
from megamm.report.plotly_charts import to_plotly
from megamm.report.study import read_results
from megamm.report.tables import runs_table

EVIL = "<script>alert('x')</script>"
TOOL = Path(__file__).parents[2] / "tools" / "render_report.py"


WIDTHS, STEPS = (64, 96, 160), (60, 160, 480)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study, collected and fitted as the tools do."""
    root = tmp_path_factory.mktemp("report")
    study = make_study(root / "study", widths=WIDTHS, steps=STEPS, datasets=make_datasets(root / "data"))
    write_runs(study / "runs.csv", collect([study])[0])
    table = read_runs(study / "runs.csv")
    write_fits(study / "fits", fit_table(table, losses="loss,loss_caption", resamples=60))
    return study


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The same study, to be changed; its prepared data is not there."""
    study = make_study(tmp_path / "study", widths=WIDTHS, steps=STEPS)
    shutil.copy(folder / "runs.csv", study)
    shutil.copytree(folder / "fits", study / "fits")
    return study


@pytest.fixture(scope="module")
def study(folder):
    return read_results(folder)


@pytest.fixture(scope="module")
def page(folder) -> str:
    path, _ = render_report(folder)
    return path.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the page


def test_page_says_first_what_the_comparison_says(folder, study, page):
    early, late = study.laws["loss"]["early"], study.laws["loss"]["late"]
    said = (
        units.prettify(verdict(compare(early, late))).replace("early", "early fusion").replace("late ", "late fusion ")
    )
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert summary["verdict"].lower() == said.lower()
    visible = page[page.index("<header>") :]
    assert visible.index(summary["verdict"]) < visible.index("<h2>")
    assert summary["runs"] == 19 == len(study.cooled)


def test_page_has_every_section_and_figure(page):
    for anchor in (
        "frontiers",
        "lead",
        "sizes",
        "constants",
        "training",
        "validation",
        "images",
        "runs",
        "rows",
        "made",
    ):
        assert f'<section id="{anchor}">' in page
    for chart, panels in {"frontier": 1, "frontier_by_source": 1, "lead": 2, "training": 3, "validation": 6}.items():
        assert [f'id="{chart}-{i}"' in page for i in range(panels + 1)] == [True] * panels + [False]
    assert page.count('<img loading="lazy" src="data:image/png;base64,') == 3
    assert "early-w64-s480" in page


def test_page_needs_no_network(page):
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", _without_plotly(page))
    assert not re.search(r"@import|url\(", _without_plotly(page))
    assert "default-src 'none'" in page
    packed = re.findall(r'<script id="plotly" type="application/gzip">([^<]*)</script>', page)
    assert len(packed) == 1 and b"plotly.js v" in gzip.decompress(base64.b64decode(packed[0]))
    assert len(page) < 3e6


def test_the_best_size_is_told_for_three_budgets(study, page):
    """Against the law's closed form: at equal marginal gains of size and data."""
    section = page[page.index('<section id="sizes">') :].split("</section>")[0]
    for group, law in study.laws["loss"].items():
        E, A, alpha, B, beta = law.parameters
        for factor in (1, 10, 100):
            flops = factor * law.flops_range[1]
            budget = flops / (6 * law.kappa)
            best = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * budget ** (beta / (alpha + beta))
            loss = E + A / best**alpha + B / (budget / best) ** beta
            for text in (units.power(flops), units.count(best), units.count(budget / best), f"{loss:.3f}"):
                assert f"<td>{text}<" in section, (group, factor, text)


def test_png_files_are_written(folder, page):
    for name in ("frontier", "frontier_by_source", "lead", "training", "validation", "image_use", "row-1", "row-3"):
        with Image.open(folder / "report" / f"{name}.png") as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 5


def test_page_escapes_all_text_and_says_that_data_is_missing(copy, tmp_path):
    (copy / "study.json").write_text(json.dumps({"name": EVIL}))
    (copy / "study.yaml").write_text(f"name: {EVIL}")
    for path in (copy / "runs").glob("*/*/result.json"):
        result = json.loads(path.read_text())
        result["name"], result["mixture"] = EVIL + result["name"], EVIL
        path.write_text(json.dumps(result))
    write_runs(copy / "runs.csv", collect([copy])[0])
    page = render_report(copy, tmp_path / "out")[0].read_text(encoding="utf-8")
    assert EVIL not in page
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") > 20
    assert "The rows cannot be drawn here" in page and "prepare_data.py" in page
    assert not (copy / "report").exists()


def _without_plotly(page: str) -> str:
    start = page.index('<script id="plotly"')
    return page[:start] + page[page.index("</script>", start) :]


# --------------------------------------------------------------------------------------------- the content


def test_flops_of_shared_steps_count_once(study):
    longest = {}
    for run in study.runs:
        flops = run.records[-1]["flops"]
        share = COOLDOWN if run.config["train"]["branch_from"] else 1
        longest[run.path] = flops * share
    assert study.flops == pytest.approx(sum(longest.values()))
    assert study.flops < 0.75 * sum(run.records[-1]["flops"] for run in study.runs)
    apart = [r for r in study.runs if not r.config["train"]["branch_from"]]
    assert len(apart) == 7  # 6 trunks and the blind run


def test_finds_the_architecture_that_is_ahead_by_its_law(study):
    found = {f.subject: f for f in findings(study)}
    assert list(found)[:3] == [
        "average of sources",
        "average, image encoder not counted",
        "average, every matrix product counted",
    ]
    caption = found["caption"].comparison
    true = {
        group: power_law.frontier_loss(np.array(LAWS[group]["caption"]), caption.flops, study.laws["loss"][group].kappa)
        for group in ("early", "late")
    }
    assert (true["early"] < true["late"]).all()
    assert caption.difference[-1] == pytest.approx(true["early"][-1] - true["late"][-1], abs=0.03)


def test_counts_flops_three_ways(study):
    counted = study.laws["loss"]["late"]
    free = study.recounted("loss", "decoder")["late"]
    exact = study.recounted("loss", "exact")["late"]
    results = {run.result["name"]: run.result for run in study.cooled}
    ratios = []
    for row in study.rows_of("late").rows:
        result = results[row["run"]]
        ratios.append(1 - 6 * result["params_vision"] * result["tokens_vision"] / row["flops"])
    ratio = float(np.exp(np.mean(np.log(ratios))))
    assert free.kappa / counted.kappa == pytest.approx(ratio, rel=0.1) and ratio < 0.95
    assert exact.flops_range[1] == max(r.result["flops_exact"] for r in study.cooled if r.architecture == "late")
    early = study.laws["loss"]["early"], study.recounted("loss", "decoder")["early"]
    assert early[0].kappa == pytest.approx(early[1].kappa, rel=1e-6)


def test_says_what_changes_where_the_encoder_is_not_counted(study):
    found = findings(study)
    uncounted = next(f for f in found if f.counting == "decoder")
    sentence = headline(study, found)[-1]
    assert sentence.startswith(
        f"If the image encoder's FLOPs are not counted, late fusion needs {uncounted.gain[0]} times"
    )
    late = study.laws["loss"]["late"], study.recounted("loss", "decoder")["late"]
    assert late[0].kappa > 1.05 * late[1].kappa
    assert float(uncounted.gain[0]) < float(found[0].gain[0])  # late fusion gets cheaper, early does not


def test_charts_of_the_fits_hold_every_run(study, page):
    charts = all_charts(study, None)
    points = sum(len(series.x) for series in charts["residuals"].panels[0].series)
    assert points == sum(fit["n_runs"] for fit in study.fits if fit["loss_column"] == "loss") == 18
    for name in ("residuals", "correlations", "holdout"):
        assert (name in charts) == (f'id="{name}-0"' in page)
    assert "residuals" in charts and "correlations" in charts


def test_shows_isoflop_profiles_where_runs_have_budgets_in_common(copy, study):
    assert not any(name.startswith("isoflop") for name in all_charts(study, None))
    rows = read_runs(copy / "runs.csv").rows
    early = [row for row in rows if row["architecture"] == "early"]
    for i, row in enumerate(early):  # three budgets of three sizes
        size = row["params"] * (0.3, 1.0, 3.0)[i % 3]
        budget = (1e14, 3e14, 1e15)[i // 3]
        row |= {"params": size, "flops": budget, "tokens": budget / 6 / size, "loss": 3 - 0.2 * i + (i % 3 != 1)}
    write_runs(copy / "runs.csv", early + [row for row in rows if row["architecture"] != "early"])
    charts = all_charts(read_results(copy), None)
    assert len(early) == 9 and "isoflop_0" in charts and "isoflop_1" not in charts
    assert charts["isoflop_0"].panels[0].title.startswith("early fusion")


def test_shows_image_use_against_the_blind_model(study):
    chart = all_charts(study, None)["image_use"]
    assert [panel.title for panel in chart.panels] == ["caption", "interleaved"]
    series = {s.name: s for s in chart.panels[0].series}
    swapped = {f"{name}, images swapped" for name in ("early fusion", "late fusion")}
    assert set(series) == {"early fusion", "late fusion", "text only (blind)"} | swapped
    assert max(series["early fusion"].y) < min(series["text only (blind)"].y)
    assert min(series["early fusion, images swapped"].y) > max(series["early fusion"].y)
    assert len(series["text only (blind)"].x) == 1


def test_both_drawings_of_a_chart_hold_all_of_its_data(study):
    chart = all_charts(study, None)["frontier"]
    figure = to_plotly(chart.panels[0], 300)
    shown = sum(len(trace.x) for trace in figure.data if "markers" in (trace.mode or ""))
    assert shown == 18
    (low, high), axis = extent(chart.panels[0], "x"), figure.layout.xaxis
    assert 10 ** axis.range[0] == pytest.approx(low) and 10 ** axis.range[1] == pytest.approx(high)
    assert low < min(study.table.numbers("flops")[:18])
    assert to_png(chart).startswith(b"\x89PNG")


def test_warnings_name_their_fits(study):
    texts = [text for fit in study.fits for text in fit["warnings"]]
    assert texts
    assert {text for text, _ in cautions(study)} == {units.prettify(text) for text in texts}
    assert any(fits == "all fits" or "fusion" in fits for _, fits in cautions(study))


def test_shows_what_was_forecast_and_what_came_out(copy):
    assert "Forecasts and what came out" not in (render_report(copy)[0]).read_text()
    run = PlannedRun(group="early", params=1e8, tokens=1e9)
    forecast = make_forecast(copy / "fits", run, by=EVIL)
    write_json(copy / "forecasts" / "big.json", forecast)
    loss = forecast["losses"]["loss"]["value"]
    score = score_forecast(forecast, {"run": "big", "params": 1e8, "tokens": 1e9, "loss": loss})
    write_json(copy / "forecasts" / "big.score.json", score)
    page = render_report(copy)[0].read_text()
    assert "Forecasts and what came out" in page and "inside 80%" in page and EVIL not in page


def test_one_architecture_has_no_verdict(copy):
    fits = json.loads((copy / "fits" / "fits.json").read_text())
    fits["fits"] = [fit for fit in fits["fits"] if fit["group"] == "early"]
    (copy / "fits" / "fits.json").write_text(json.dumps(fits))
    study = read_results(copy)
    assert study.pair is None and findings(study) == []
    none, best, more = headline(study, [])
    assert none == "No verdict: a comparison needs the fits of two architectures, and this study has early fusion."
    runs = [run for run in study.cooled if run.architecture == "early"]
    least = min(run.result["loss"] for run in runs)
    assert f"The best of {len(runs)} models" in best and f"a loss of {least:.3f} on data" in best
    _, a, alpha, b, beta = study.laws["loss"]["early"].parameters
    run = next(run for run in runs if run.result["loss"] == least)
    gains = [x * (n**-p - (2 * n) ** -p) for x, n, p in ((a, run.params, alpha), (b, run.result["tokens"], beta))]
    assert f"lower it by {gains[0]:.3f}, and twice the tokens by {gains[1]:.3f}" in more
    assert "lead" not in all_charts(study, None)


def test_unfinished_runs_are_named(copy):
    run = copy / "runs" / "late-w64" / "late-w64-s480"
    (run / "result.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 490, "lo')  # as a kill leaves it
    study = read_results(copy)
    assert [r.path for r in study.runs if r.result is None] == [run]
    assert "Not finished, and left out: runs/late-w64/late-w64-s480" in runs_table(study)
    assert headline(study, findings(study))


# --------------------------------------------------------------------------------------------- bad input


def _break_metrics(study: Path) -> None:
    path = study / "runs" / "early-w64" / "early-w64-s60" / "metrics.jsonl"
    path.write_text("{broken\n" + path.read_text())


def _break_config(study: Path) -> None:
    path = study / "runs" / "early-w64" / "early-w64-s60" / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {}}))


def _rename_groups(study: Path) -> None:
    fits = json.loads((study / "fits" / "fits.json").read_text())
    fits["fits"][0]["group"] = "elsewhere"
    (study / "fits" / "fits.json").write_text(json.dumps(fits))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (s / "runs.csv").unlink(), r"runs\.csv: not found; run: python tools/collect_runs\.py"),
        (lambda s: (s / "fits" / "fits.json").unlink(), r"not found; run: python tools/fit_scaling_laws\.py"),
        (lambda s: (s / "fits" / "bootstrap.npz").unlink(), r"bootstrap\.npz: not found"),
        (_rename_groups, r"no column holds the groups"),
        (_break_metrics, r"metrics\.jsonl: not JSON lines"),
        (_break_config, r"config\.yaml: no field schedule, train, data"),
    ],
)
def test_names_the_file_and_the_fix(copy, damage, message):
    damage(copy)
    with pytest.raises(InputError, match=message):
        render_report(copy)
    assert not (copy / "report").exists()


def test_tool_exits_2_without_runs(tmp_path):
    done = subprocess.run([sys.executable, str(TOOL), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "run_study.py" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (units.count, 941_696, "942K"),
        (units.count, 1.5e9, "1.5B"),
        (units.count, 999_900, "1M"),
        (units.count, 12, "12"),
        (units.power, 2.18e13, "2.2×10¹³"),
        (units.power, 9.99e13, "10¹⁴"),
        (units.power, 3e-7, "3×10⁻⁷"),
        (units.digits, 0.04567, "0.0457"),
        (units.digits, -1234.5, "-1230"),
        (units.duration, 59, "59 s"),
        (units.duration, 7200, "2 h"),
        (units.duration, 4e5, "4.6 days"),
        (units.prettify, "from 1.1e+13 to 2e15 at 95%", "from 1.1×10¹³ to 2×10¹⁵ at 95%"),
    ],
)
def test_numbers_read_well(form, value, text):
    assert form(value) == text


@given(st.floats(-30, 30), st.floats(1e-4, 20))
def test_log_axes_have_a_few_round_ticks_in_range(start, decades):
    low, high = 10**start, 10 ** (start + decades)
    values, texts = units.log_ticks(low, high)
    assert 2 <= len(values) <= 9 and len(texts) == len(values)
    assert all(low * 0.99 <= v <= high * 1.01 for v in values)
    assert values == sorted(values) and all(math.isfinite(v) for v in values)


def test_shades_run_from_pale_to_full():
    assert shade("#0072B2", 1) == "#0072b2"
    assert int(shade("#0072B2", 0)[1:3], 16) > 100
