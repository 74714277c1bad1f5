"""The report as a browser without a network shows it."""

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.runs.collect import collect
from megamm_laws.runs.table import read_runs, write_runs
from PIL import Image
from study_factory import make_datasets, make_study

from megamm.report import render_report

CHROMIUM = shutil.which("chromium")
WIDTH, HEIGHT, PANELS = 1280, 5000, 27

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH (Debian: apt-get install chromium)"),
]


def browse(page: Path, profile: Path, *arguments: str, width: int = WIDTH) -> str:
    """Open a page in headless Chromium with an empty profile; returns its standard output."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--virtual-time-budget=20000",
        f"--window-size={width},{HEIGHT}",
        f"--user-data-dir={profile}",
        *arguments,
        page.resolve().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("screenshot")
    study = make_study(root / "study", datasets=make_datasets(root / "data"))
    write_runs(study / "runs.csv", collect([study])[0])
    write_fits(study / "fits", fit_table(read_runs(study / "runs.csv"), losses="all", resamples=100))
    return render_report(study)[0]


@pytest.fixture(scope="module")
def dom(page, tmp_path_factory) -> str:
    """The document after its scripts have run."""
    return browse(page, tmp_path_factory.mktemp("profile"), "--dump-dom")


def test_every_figure_is_drawn(dom):
    body = dom[dom.index("<header>") :]
    drawn = re.findall(r'<div class="plot js-plotly-plot" id="([\w-]+)"', body)
    assert len(drawn) == PANELS == len(re.findall(r'<div class="plot(?: js-plotly-plot)?" id', body))
    assert body.count("<figure") == body.count('class="drawn"')
    assert len(re.findall(r'<svg class="main-svg"', body)) >= 2 * PANELS  # axes and data, hover layer
    assert len(re.findall(r'class="trace scatter', body)) > 100
    text = re.sub(r"<script.*?</script>|<noscript.*?</noscript>|<[^>]*>", " ", body, flags=re.DOTALL)
    assert "Fitted constants" in text
    for word in ("undefined", "NaN", "nan", "None", "Traceback", "Something went wrong"):
        assert not re.search(rf"\b{word}\b", text)


def test_panels_keep_to_their_columns(dom):
    """Figures drawn before the page has its final width would overlap."""
    widths = [float(w) for w in re.findall(r'<svg class="main-svg"[^>]* width="([\d.]+)"', dom)]
    assert max(widths) <= WIDTH - 48
    assert sorted({round(w) for w in widths}) == [367, 558, 1132]  # three, two and one in 1132 pixels


def test_nothing_is_loaded_from_a_network(dom):
    body = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    sources = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", body)
    assert sources and all(s.startswith(("data:", "#")) for s in sources)
    assert not re.search(r"@import|url\(['\"]?https?:", body)


def test_the_page_is_small_enough_to_send(page):
    assert page.stat().st_size < 3e6


def test_without_scripts_there_are_pictures(page, tmp_path):
    """As a browser that cannot unpack the charts shows it."""
    plain = tmp_path / "plain.html"
    plain.write_text(re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))
    text = plain.read_text(encoding="utf-8")
    assert text.count('<img class="still" src="data:image/png') == text.count("<figure") > 5
    picture = tmp_path / "plain.png"
    browse(plain, tmp_path / "profile", f"--screenshot={picture}")
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"), float)
    for band in np.split(pixels, 10):
        assert band.std() > 6, "a part of the page is blank"
    # Lines of the charts in the colours of early and late fusion, which a smaller picture with few colours still has.
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (abs(pixels - colour).max(-1) < 24).sum() > 300


def test_headings_are_in_order(page):
    levels = [int(level) for level in re.findall(r"<h([1-6])", page.read_text(encoding="utf-8"))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_a_click_on_a_heading_sorts_the_runs(page, tmp_path):
    click = '<script>document.querySelector("table.sortable thead th:nth-child(7)").click()</script>'
    clicked = tmp_path / "clicked.html"
    clicked.write_text(page.read_text(encoding="utf-8").replace("</body>", click + "</body>"), encoding="utf-8")
    dom = browse(clicked, tmp_path / "profile", "--dump-dom")
    table = dom[dom.index('class="sortable"') :].split("</table>")[0]
    assert re.findall(r'aria-sort="ascending"[^>]*>([^<]*)<', table) == ["loss"]
    rows = [re.findall(r'data-sort="([\d.e+-]+)"', row) for row in table.split("<tr")[2:]]
    losses = [float(row[3]) for row in rows]  # after params, tokens, FLOPs
    assert len(losses) == 41 and losses == sorted(losses)
    assert losses[0] < losses[-1]


def test_screenshot_shows_a_filled_page(page, tmp_path):
    picture = tmp_path / "report.png"
    browse(page, tmp_path / "profile", f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert image.size == (WIDTH, HEIGHT)
        pixels = np.asarray(image.convert("RGB"), float)
    for band in np.split(pixels, 10):
        assert band.std() > 6, "a part of the page is blank"
    margin = np.concatenate([pixels[:, :24], pixels[:, -24:]], axis=1)
    assert margin.std() < 1, "something reaches into the margin"
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # early and late fusion
        assert (abs(pixels - colour).max(-1) < 12).sum() > 2000


def test_narrow_screens_need_no_sideways_scrolling(page, tmp_path):
    picture = tmp_path / "narrow.png"
    browse(page, tmp_path / "profile", f"--screenshot={picture}", width=500)
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"), float)
    assert pixels[:, -12:].std() < 1
    assert pixels[3000:].std() > 6
