"""The preflight: fit ranks pass, and a rank that is slow, wrong or sees another folder is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTY = """
import os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from megamm import preflight

fault = sys.argv.pop(1)
# Everything else is as fast on all ranks, so that a busy machine is not taken for a bad one.
preflight.SLOW = 0.5 if fault == "slow" else 0.0
bad = os.environ["RANK"] == "1"
multiply, all_reduce = preflight.multiply, dist.all_reduce
if fault == "slow":
    def paced(a, b):
        time.sleep(0.2 if bad else 0.02)
        return multiply(a, b)
    preflight.multiply = paced
if bad and fault == "product":
    preflight.multiply = lambda a, b: multiply(a, b) + (torch.arange(a.shape[0]) == 5)
if bad and fault == "sum":
    dist.all_reduce = lambda x: (all_reduce(x), x[7:8].add_(1))
if bad and fault == "folder":
    sys.argv[sys.argv.index("--run-dir") + 1] += "-elsewhere"
if bad and fault == "dead":
    preflight.Preflight.ring = lambda self: os._exit(3)
preflight.command()
"""


def run(tmp_path: Path, *arguments, ranks: int = 2) -> subprocess.CompletedProcess:
    launcher = ["-m", "megamm.launch", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, *arguments, "--device", "cpu", "--run-dir", tmp_path / "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=400)


def test_alone(tmp_path):
    done = run(tmp_path, "-m", "megamm.preflight", "--out", tmp_path / "report.json", ranks=1)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    (rank,) = report["ranks"]
    assert report["fit"] and report["problems"] == [] and report["seconds"] < 60
    assert rank["tflops"] > 0 and rank["disk_mb_per_second"] > 0 and rank["free_gib"] > 0
    assert not list((tmp_path / "run").iterdir()), "nothing is left in the folder of the run"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("none", None),
        ("slow", "slow matrix products"),
        ("product", "entries of a matrix product are wrong"),
        ("sum", "all-reduce gave 4, expected 3"),
        ("folder", "is not the folder that rank 0 sees"),
    ],
)
def test_a_bad_rank_is_named(tmp_path, fault, expected):
    (tmp_path / "faulty.py").write_text(FAULTY)
    done = run(tmp_path, tmp_path / "faulty.py", fault, "--out", tmp_path / "report.json")
    assert (tmp_path / "report.json").exists(), done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"] < 60 and len(report["ranks"]) == 2
    if expected is None:
        assert done.returncode == 0 and report["fit"], done.stderr
        assert report["ranks"][1]["ring_gb_per_second"] > 0 and report["ranks"][0]["all_reduce_gb_per_second"] > 0
    else:
        assert done.returncode == 1 and not report["fit"]
        (problem,) = report["problems"]
        assert problem.startswith("rank 1 on ") and expected in problem
        assert problem in done.stderr


def test_a_rank_that_does_not_answer_is_named(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    done = run(tmp_path, tmp_path / "faulty.py", "dead")
    assert done.returncode == 1
    assert "ring failed" in done.stderr or "exitcode  : 3" in done.stderr


def test_bad_input(tmp_path):
    (tmp_path / "run").write_text("a file is in the way")
    done = run(tmp_path, "-m", "megamm.preflight", ranks=1)
    assert done.returncode == 2 and "train.run_dir" in done.stderr
    command = [sys.executable, "-m", "megamm.preflight"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--run-dir" in done.stderr
