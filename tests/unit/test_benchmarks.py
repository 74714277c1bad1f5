"""Benchmarks run for minutes; that they still fit the library is seen by importing them."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_can_be_imported(path):
    runpy.run_path(str(path), run_name="imported")


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py as a module."""
    path = next(path for path in SCRIPTS if path.stem == "gpu")
    spec = importlib.util.spec_from_file_location("benchmark_gpu", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_every_job_of_a_gpu_run_is_in_one_part(gpu, tmp_path):
    names = {part: [job.name for job in jobs(tmp_path)] for part, jobs in gpu.PARTS.items()}
    assert names["test"] == ["tests"] and names["train"] == ["train_step"]
    scripts = (gpu.ROOT / "kernels/bench").glob("*.py")
    assert sorted(names["bench"]) == sorted(p.stem for p in scripts if "\nfrom harness import" in p.read_text())
    assert names["bench"][0] == "interval_attention"


def test_a_part_that_is_cut_off_keeps_what_it_has(gpu, tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()

    jobs = [
        gpu.Job("good", ["-c", "print('all is well')"]),
        gpu.Job("bad", ["-c", "raise SystemExit(3)"]),
        gpu.Job("never", []),
    ]
    run = gpu.run

    def run_until_stopped(job, *args):
        if job.name == "never":
            raise KeyboardInterrupt
        return run(job, *args)

    monkeypatch.setattr(gpu, "run", run_until_stopped)
    monkeypatch.setitem(gpu.PARTS, "bench", lambda out: jobs)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_part("bench", tmp_path, 1, None, {"device": "none"})
    written = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert written["about"] == {"device": "none"}
    assert [(job["job"], job["outcome"], job["last_line"]) for job in written["jobs"]] == [
        ("good", "passed", "all is well"),
        ("bad", "failed: 3", ""),
    ]


def test_a_job_that_takes_too_long_is_ended_and_its_output_kept(gpu, tmp_path):
    job = gpu.Job("slow", ["-c", "import time; print('begun'); time.sleep(60)"])
    result = gpu.run(job, 1.5, tmp_path / "slow.txt")
    assert result["outcome"] == "failed: out of time" and result["last_line"] == "begun"
