"""The card of a prepared dataset: its counts, its documents, and nothing of them that a browser would run."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megamm.data import images
from megamm.data.prepare import PrepareSettings, prepare
from megamm.data.tokenizer import train_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "data_card.py"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Thirty captions, one of them hostile, two alike, and one whose picture is broken."""
    folder = tmp_path_factory.mktemp("card")
    source = folder / "<b>source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for n in range(30):
        (source / f"{n}.png").write_bytes(images.encode(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)))
        (source / f"{n}.txt").write_text(f"picture {n} " * (n + 1))
    (source / "0.txt").write_text("<script>alert(1)</script>")
    for name in ("29.png", "29.txt"):
        (source / f"copy-{name}").write_bytes((source / name).read_bytes())
    (source / "bad.png").write_bytes(b"no")
    (source / "bad.txt").write_text("nothing")
    train_tokenizer(["picture 0 1 2 3 <script>alert(1)</script>"] * 3, 300, folder / "tokenizer.json")
    settings = PrepareSettings(
        inputs=(str(source),), tokenizer=str(folder / "tokenizer.json"), image_size=16, patch_size=8, max_length=400
    )
    prepare(settings, folder / "<i>set")
    return folder / "<i>set"


def test_the_card_shows_what_is_there(dataset, tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, dataset, "--out", tmp_path / "card.html"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "card.html").read_text()
    info = json.loads((dataset / "dataset.json").read_text())
    for split in info["splits"].values():
        cells = [split[key] for key in ("num_documents", "num_images", "num_text_tokens", "num_patches")]
        assert "".join(f"<td>{cell:,}</td>" for cell in cells) in page
    assert "31 documents of kind caption" in page and "1 documents repeat an earlier one" in page
    assert "<td class=left>not an image of a known format</td><td>1</td>" in page
    # Every document is in exactly one bar of each histogram.
    for figure in re.findall(r"<figure>.*?</figure>", page):
        assert sum(int(n) for n in re.findall(r": ([\d,]+) documents", figure)) == 31
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 8 and images.decode(base64.b64decode(pictures[0])).shape == (16, 16, 3)
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "<b>" not in page and "<i>" not in page


def test_a_damaged_dataset_is_one_line(dataset, tmp_path):
    (tmp_path / "dataset.json").write_text("{")
    done = subprocess.run(
        [sys.executable, TOOL, tmp_path, "--out", tmp_path / "c.html"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "dataset.json: not valid JSON" in done.stderr and "Traceback" not in done.stderr
