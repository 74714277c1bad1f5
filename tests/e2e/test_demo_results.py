"""What `make demo` must have shown; runs where its output lies in demo/ (CI makes it first)."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

STUDY = Path(__file__).resolve().parents[2] / "demo" / "study"
SOURCES = ("caption", "interleaved", "text")

pytestmark = pytest.mark.skipif(not (STUDY / "fits" / "fits.json").exists(), reason="run `make demo` first")


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    with (STUDY / "runs.csv").open() as file:
        return list(csv.DictReader(file))


def ladder(runs: list[dict], architecture: str, column: str) -> dict[tuple[int, int], float]:
    """(rank of size, rank of tokens) -> loss."""
    chosen = [r for r in runs if r["architecture"] == architecture]
    sizes, budgets = (sorted({round(float(r[k]), -4) for r in chosen}) for k in ("params", "tokens"))
    return {
        (sizes.index(round(float(r["params"]), -4)), budgets.index(round(float(r["tokens"]), -4))): float(r[column])
        for r in chosen
    }


@pytest.mark.parametrize("architecture", ["early", "late"])
@pytest.mark.parametrize("source", SOURCES)
def test_loss_falls_with_size_and_with_tokens(runs, architecture, source):
    losses = ladder(runs, architecture, f"loss_{source}")
    sizes, budgets = (1 + max(key[axis] for key in losses) for axis in (0, 1))
    assert sizes >= 4 and budgets >= 4
    by_size = np.array([[losses[s, b] for b in range(budgets)] for s in range(sizes)])
    assert (np.diff(by_size, axis=1) < 0).all()
    assert (np.diff(by_size, axis=0) < 0).all()


@pytest.mark.parametrize("architecture", ["early", "late"])
def test_images_are_used(architecture):
    results = [json.loads(path.read_text()) for path in STUDY.rglob("result.json")]
    blind = next(r for r in results if r["architecture"] == "text")
    same = [
        r
        for r in results
        if (r["architecture"], r["width"], r["steps"], r["cooled"])
        == (architecture, blind["width"], blind["steps"], True)
    ]
    seeing = same[0]
    assert seeing["losses"]["caption"]["loss"] < blind["losses"]["caption"]["loss"] - 0.05
    assert seeing["losses_swapped"]["caption"]["loss"] > seeing["losses"]["caption"]["loss"] + 0.2
