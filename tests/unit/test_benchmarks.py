"""Benchmarks run for minutes; that they still fit the library is seen by importing them."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_can_be_imported(path):
    runpy.run_path(str(path), run_name="imported")
