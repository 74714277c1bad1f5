"""From the generator to the report with the tools alone, at a very small size; and that images are used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STUDY = """
name: small
base:
  model: {{depth: 2, hidden_multiple: 16, head_dim: 16}}
  data:
    sources:
      caption: {{path: {data}/caption, weight: 70}}
      text: {{path: {data}/text, weight: 30}}
    row_length: 128
    window_tokens: 50_000
  optimizer: {{lr: 6.0e-3}}
  schedule: {{warmup_steps: 20, cooldown: linear}}
  train: {{batch_rows: 16, log_every: 20}}
  eval: {{rows: 48, swap_images: true}}
  checkpoint: {{every: 200, keep: 1, final: false}}
architectures:
  early: {{}}
  late: {{optimizer: {{vision_lr_factor: 1.0}}}}
widths: [16, 32]
tokens: [100_000, 200_000, 400_000]
baselines:
  - {{architecture: text, width: 32, tokens: 400_000}}
"""


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer, study = folder / "tokenizer.json", folder / "study"
    kinds = ("caption", "text")
    tool(
        "train_tokenizer.py",
        *(f"scenes:{k}" for k in kinds),
        "--num-documents",
        500,
        "--vocab-size",
        512,
        "--out",
        tokenizer,
    )
    for kind in kinds:
        tool(
            "prepare_data.py",
            f"scenes:{kind}",
            "--num-documents",
            6000,
            "--out",
            folder / kind,
            "--tokenizer",
            tokenizer,
            "--image-size",
            16,
            "--patch-size",
            8,
            "--max-length",
            128,
        )
    (folder / "study.yaml").write_text(STUDY.format(data=folder))
    tool("run_study.py", folder / "study.yaml", "--out", study)
    tool("collect_runs.py", study, "--out", study / "runs.csv")
    tool("fit_scaling_laws.py", study / "runs.csv", "--out", study / "fits", "--bootstrap", 100, "--losses", "all")
    tool("render_report.py", study, "--out", folder / "report")
    return folder


def result(folder: Path, architecture: str, width: int, tokens: int) -> dict:
    for path in (folder / "study").rglob("result.json"):
        values = json.loads(path.read_text())
        positions = values["steps"] * values["batch_tokens"]
        if (
            (values["architecture"], values["width"]) == (architecture, width)
            and values["cooled"]
            and (tokens <= positions < tokens + values["batch_tokens"])
        ):
            return values
    raise AssertionError(f"no result of {architecture}, width {width}, {tokens} tokens")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["early", "late"])
def test_images_are_used(folder, architecture):
    """The model beats a blind one on captions, and captions of other images are much less likely."""
    seeing, blind = (result(folder, a, 32, 400_000) for a in (architecture, "text"))
    assert seeing["losses"]["caption"]["loss"] < blind["losses"]["caption"]["loss"] - 0.02
    assert seeing["losses_swapped"]["caption"]["loss"] > seeing["losses"]["caption"]["loss"] + 0.05
    assert blind["losses_swapped"]["caption"] == blind["losses"]["caption"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["early", "late"])
def test_loss_falls_with_tokens(folder, architecture):
    losses = [result(folder, architecture, 32, tokens)["loss"] for tokens in (100_000, 200_000, 400_000)]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.slow
def test_the_report_says_it_all(folder):
    page = (folder / "report" / "index.html").read_text()
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert summary["verdict"] and summary["verdict"] in page
    fits = json.loads((folder / "study" / "fits" / "fits.json").read_text())["fits"]
    assert {fit["group"] for fit in fits} >= {"early", "late"}
    # The policy keeps the browser off the network; URLs in the comments of the inlined plotly.js are only text.
    assert "default-src 'none'" in page and "<script src" not in page


@pytest.mark.slow
def test_a_second_run_of_the_study_trains_nothing(folder):
    before = {p: p.stat().st_mtime_ns for p in (folder / "study").rglob("result.json")}
    tool("run_study.py", folder / "study.yaml", "--out", folder / "study")
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "study").rglob("result.json")}
