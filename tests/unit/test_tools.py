"""Command lines given what they cannot use: a line on stderr and exit code 2, before any work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megamm_laws.fitting.fits_file import read_laws
from megamm_laws.fitting.outputs import fit_table, write_fits
from megamm_laws.runs.table import read_runs

from megamm.errors import InputError
from megamm.files import check_out
from megamm.planning.inputs import read_fits

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "tests" / "data" / "chinchilla_runs.csv"


def tool(name: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess, *expected: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(text in done.stderr.strip().splitlines()[-1] for text in expected), done.stderr


@pytest.fixture(scope="module")
def fits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fits")
    write_fits(folder, fit_table(read_runs(RUNS), resamples=20))
    return folder


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
def test_a_base_config_of_another_shape(fits, tmp_path, text, expected):
    path = tmp_path / "base.yaml"
    path.write_text(text + "\n")
    done = tool("plan_training", fits, "--flops", "1e21", "--base-config", path, "--out", tmp_path / "plan")
    refused(done, f"{path}: {expected}")
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("fit_scaling_laws", ("missing.csv",)),
        ("fit_isoflops", ("missing.csv",)),
        ("next_runs", ("missing.csv", "--budget", "1e20")),
        ("compare_groups", ("missing", "--runs", "missing.csv")),
        ("plan_training", ("missing", "--flops", "1e21")),
        ("plot_fits", ("missing", "--runs", "missing.csv")),
        ("render_report", ("missing",)),
        ("run_study", ("missing.yaml",)),
        ("prepare_data", ("missing", "--tokenizer", "missing.json")),
    ],
)
def test_a_folder_that_cannot_be_made_is_said_before_the_work(tmp_path, name, arguments):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        done = tool(name, *arguments, "--out", out)
        refused(done, f"error: --out: {tmp_path / 'file'} is a file, not a folder; give another path")
        assert len(done.stderr.strip().splitlines()) == 1
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("name", "arguments"), [("collect_runs", ("missing",)), ("train_tokenizer", ("missing", "--vocab-size", "300"))]
)
def test_a_file_that_cannot_be_made_is_said_before_the_work(tmp_path, name, arguments):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    done = tool(name, *arguments, "--out", tmp_path / "folder")
    refused(done, f"error: --out: {tmp_path / 'folder'} is a folder; give the path of a file")
    done = tool(name, *arguments, "--out", tmp_path / "file" / "x")
    refused(done, f"error: --out: {tmp_path / 'file'} is a file, not a folder; give another path")


TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((name, ()) for name in TOOLS),
        ("fit_scaling_laws", (RUNS, "--out", "x", "--bogus")),
        ("fit_scaling_laws", (RUNS, "--out", "x", "--bootstrap", "x")),
        ("fit_scaling_laws", (RUNS, "--out", "x", "--bootstrap", "1000000000")),
        ("fit_isoflops", (RUNS, "--out", "x", "--draws", "100000000")),
        ("plan_training", ("fits.json",)),
        ("run_study", ("study.yaml", "--out", "x", "--launcher", "ssh")),
    ],
)
def test_a_bad_command_line_is_told_on_one_line(name, arguments):
    done = tool(name, *arguments)
    refused(done)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and done.stdout == ""


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("fit_scaling_laws", (RUNS,)),
        ("fit_isoflops", (RUNS,)),
        ("collect_runs", (RUNS,)),
        ("render_report", (ROOT,)),
        ("estimate", ("--config", "missing.yaml", "--world-size", "1", "--gpu", "h100")),
    ],
)
def test_an_empty_out_is_not_the_working_directory(name, arguments):
    refused(tool(name, *arguments, "--out", ""), "error: --out: no path is given; name a f")


def test_estimate_of_documents_without_length():
    config = ROOT / "examples" / "nmm" / "early-275m.yaml"
    done = tool("estimate", "--config", config, "--world-size", "8", "--gpu", "h100", "--document-length", "0")
    refused(done, "--document-length: 0 is not from 1 to data.row_length")


def test_outputs_are_checked_without_making_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.csv").touch()
    (tmp_path / "old").mkdir()
    for path in ("new.csv", "old.csv", "a/b/new.csv"):
        check_out(path, folder=False)
    for path in ("new", "old", "a/b", tmp_path / "a"):
        check_out(path, folder=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "old.csv"]
    with pytest.raises(InputError, match=r"--out: /dev/null is no ordinary file"):
        check_out("/dev/null", folder=False)  # would be replaced
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for path, folder in (("old", True), ("old/x.csv", False), ("old/a/b", True)):
        with pytest.raises(InputError, match=r"--out: folder old is not writable"):
            check_out(path, folder=folder)
