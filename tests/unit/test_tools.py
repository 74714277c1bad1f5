"""Command lines given what they cannot use: a line on stderr and exit code 2, before any work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megamm.errors import InputError
from megamm.scaling.compare import read_laws
from megamm.scaling.plan.inputs import read_fits

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "tests" / "data" / "chinchilla_runs.csv"
FITS = ROOT / "demo" / "study" / "fits"


def tool(name: str, *arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def refused(done: subprocess.CompletedProcess, *expected: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(text in done.stderr.strip().splitlines()[-1] for text in expected), done.stderr


@pytest.mark.parametrize("size", [0, 2000])
def test_truncated_draws(tmp_path, size):
    (tmp_path / "fits.json").write_text(json.dumps({"fits": []}))
    np.savez(tmp_path / "bootstrap.npz", a=np.zeros(1000))
    (tmp_path / "bootstrap.npz").write_bytes((tmp_path / "bootstrap.npz").read_bytes()[:size])
    for read in (read_laws, read_fits):
        with pytest.raises(InputError, match=r"no readable fits \(.*run tools/fit_scaling_laws.py again"):
            read(tmp_path, "loss")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("fit_scaling_laws", (RUNS, "--out", "x")),
        ("fit_isoflops", (RUNS, "--out", "x")),
        ("next_runs", (RUNS, "--budget", "1e20")),
    ],
)
def test_a_seed_below_zero(name, arguments):
    refused(tool(name, *arguments, "--seed", "-1"), "argument --seed", "-1 is not a whole number of zero or more")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: [1]", "data: expected a mapping"),
        ("train: 3", "train: expected a mapping"),
        ("data: {sources: 3}", "data.sources: expected a mapping"),
        ("data: {row_length: long}", "data.row_length: 'long' is not a whole number above zero"),
        ("train: {batch_rows: 0}", "train.batch_rows: 0 is not a whole number above zero"),
    ],
)
def test_a_base_config_of_another_shape(tmp_path, text, expected):
    path = tmp_path / "base.yaml"
    path.write_text(text + "\n")
    done = tool("plan_training", FITS, "--flops", "1e21", "--base-config", path, "--out", tmp_path / "plan")
    refused(done, f"{path}: {expected}")
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "plan").exists()
