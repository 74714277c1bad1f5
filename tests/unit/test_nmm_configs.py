"""The configs of the paper's sizes: written by their generator, valid, and as large as the paper prints."""

import runpy
from pathlib import Path

import pytest

from megamm.config import load
from megamm.model.counts import count_parameters
from megamm.model.sizes import resolve_model

FOLDER = Path(__file__).parents[2] / "examples" / "nmm"
GENERATOR = runpy.run_path(str(FOLDER / "generate.py"))
PRINTED = {f"{kind}-{size}": row[-1] for kind in ("early", "moe") for size, row in GENERATOR["EARLY"].items()}
PRINTED |= {f"late-{size}": row[-1] for size, row in GENERATOR["LATE"].items()}


def test_files_are_those_of_the_generator():
    assert {path.name: path.read_text() for path in FOLDER.glob("*.yaml")} == GENERATOR["configs"]()


@pytest.mark.parametrize("name", PRINTED)
def test_counted_parameters_are_the_printed_ones(name):
    model = resolve_model(load(FOLDER / f"{name}.yaml").model)
    counts = count_parameters(model)
    active = counts.active_decoder + counts.vision
    assert active == pytest.approx(PRINTED[name], rel=0.01 if name.startswith("late") else 0.005)
    assert (counts.total > 3 * active) == name.startswith("moe")
