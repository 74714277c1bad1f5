"""megamm-start on two small folders, from pages and captions to the report; again, and with little to go on."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from megamm.commands.start import parse_arguments
from megamm.commands.steps import COMMANDS, is_newer

ROOT = Path(__file__).resolve().parents[2]
COLORS = ("red", "green", "blue", "orange")
WORDS = (
    "the",
    "old",
    "house",
    "by",
    "a",
    "river",
    "has",
    "garden",
    "birds",
    "sing",
    "while",
    "people",
    "walk",
    "along",
)


def picture(path: Path, rng: random.Random) -> str:
    """Draw a shape; returns what it is."""
    color, shape = rng.choice(COLORS), rng.choice(("circle", "square"))
    image = Image.new("RGB", (rng.randint(60, 90), rng.randint(60, 90)), "white")
    draw = ImageDraw.Draw(image)
    box = (rng.randint(2, 20), rng.randint(2, 20), rng.randint(35, 55), rng.randint(35, 55))
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, color)
    image.save(path)
    return f"a {color} {shape}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("own data"), random.Random(0)
    for name in ("pages", "captions"):
        (folder / name).mkdir()
    for i in range(60):
        shown = picture(folder / "pages" / f"p{i}.png", rng)
        before, after = (" ".join(rng.choices(WORDS, k=30)) for _ in range(2))
        body = f"<h1>Page {i}</h1><p>{before}.</p><img src='p{i}.png'><p>This is {shown}.</p><p>{after}.</p>"
        (folder / "pages" / f"p{i}.html").write_text(f"<html><body>{body}</body></html>")
    for i in range(120):
        (folder / "captions" / f"c{i}.txt").write_text(f"{picture(folder / 'captions' / f'c{i}.png', rng)}, number {i}")
    return folder


def start(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "start.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, timeout=800
    )


@pytest.mark.slow
def test_from_two_folders_to_a_report(folders):
    inputs = ("pages", "captions", "--minutes", "0.1")
    asked = start(folders, *inputs)
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert "13 models" in asked.stdout and asked.stdout.rstrip().endswith("--yes")
    assert "interleaved" in asked.stdout and "read it" in asked.stdout and "Warning" in asked.stdout
    assert (folders / "own" / "study.yaml").exists() and not (folders / "own" / "study").exists()

    done = start(folders, *inputs, "--yes")
    assert done.returncode == 0, done.stderr[-3000:]
    for line in (
        "Look: done before",
        "Tokenizer: done before",
        "Data: captions: done before",
        "Study file: done before",
    ):
        assert line in done.stderr
    summary = json.loads((folders / "own" / "report" / "summary.json").read_text())
    *_, answer, path = done.stdout.strip().splitlines()
    assert answer.startswith(summary["verdict"]) and path == "Report: own/report/index.html"
    assert summary["verdict"] in (folders / "own" / "report" / "index.html").read_text()

    before = {p: p.stat().st_mtime_ns for p in (folders / "own").rglob("*") if p.is_file()}
    again = start(folders, *inputs)  # nothing is left to ask
    assert again.returncode == 0 and again.stdout.strip().splitlines()[-2:] == [answer, path]
    assert again.stderr.count("done before") == 9
    assert before == {p: p.stat().st_mtime_ns for p in (folders / "own").rglob("*") if p.is_file()}

    other = start(folders, "pages", "--yes")
    assert other.returncode == 2 and "own was made from" in other.stderr


def test_steps_are_console_scripts():
    scripts = (ROOT / "pyproject.toml").read_text()
    assert all(f'{name} = "{module}:command"' in scripts for name, module in COMMANDS.items())


def test_newer(tmp_path):
    for number, name in enumerate(("a", "b", "c")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (number, number))
    a, b, c = (tmp_path / name for name in ("a", "b", "c"))
    assert is_newer(c, [a, b]) and not is_newer(b, [a, c]) and not is_newer(tmp_path / "d", [a])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pages", "pages/"], "pages/: given twice"),
        (["."], "lie in each other"),
        (["own/pages"], "lie in each other"),
        (["scenes:text"], "make demo"),
        (["pages", "--minutes", "0"], "--minutes: 0 is not a number above 0"),
    ],
)
def test_inputs_that_cannot_be(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["megamm-start", *arguments])
    with pytest.raises(SystemExit) as ended:
        parse_arguments()
    assert ended.value.code == 2 and expected in capsys.readouterr().err


def test_one_document_is_too_few(tmp_path):
    (tmp_path / "a.txt").write_text("All that there is.")
    done = start(tmp_path, "a.txt", "--yes")
    assert done.returncode == 2 and "a.txt: 1 document with text, and 2 are needed" in done.stderr
    assert not (tmp_path / "own").exists()
