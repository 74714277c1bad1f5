"""All that needs a GPU, in three parts of under ten minutes: kernel tests, kernel benchmarks, a training step.

    python benchmarks/gpu.py [--part test|bench|train ...] [--out DIR] [--minutes 8.5] [--only JOB ...]

A job that fails does not stop the others, but the exit status tells. A job whose imports are missing is skipped.
Every job may use an equal share, by weight, of the time that its part has left, so each part ends in time; benchmarks
are told their share and leave out what would not fit, minor peers first. Results go to DIR as soon as they are there: a
CSV and a plot per op, train_step_cuda.csv and .json, and gpu_PART.json with the device, its driver, versions and every
job's outcome; logs to DIR/logs. A part that is cut off keeps what it has.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TRAIN_STEP = {
    "dtype": "bfloat16",
    "width": "1632",
    "depth": "8",
    "head-dim": "96",
    "vocab-size": "50432",
    "row-length": "4096",
    "rows": "4",
}
WEIGHTS = {"interval_attention": 4, "linear_cross_entropy": 2}
"""Shares of the time; 1 for all others."""
PACKAGES = ("torch", "triton", "liger-kernel", "flash-attn", "transformers", "transformer-engine")
"""Whose versions results depend on."""


@dataclass
class Job:
    """One command; ``takes_budget`` if it can be told how long it may take."""

    name: str
    command: list[str]
    takes_budget: bool = False

    @property
    def weight(self) -> int:
        return WEIGHTS.get(self.name, 1)


def test_jobs(out: Path) -> list[Job]:
    """The tests that need a GPU; every test is a line of the log as soon as it has ended."""
    command = ["-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels"]
    if find_spec("xdist"):
        command += ["-n", "6"]  # most of the time goes into compiling kernels
    return [Job("tests", command)]


def bench_jobs(out: Path) -> list[Job]:
    """A benchmark for each op, those with most weight in a training step first."""
    scripts = [path for path in (ROOT / "kernels/bench").glob("*.py") if "\nfrom harness import" in path.read_text()]
    jobs = [
        Job(path.stem, [str(path), "--device", "cuda", "--out", str(out)], takes_budget=True)
        for path in sorted(scripts)
    ]
    return sorted(jobs, key=lambda job: -job.weight)


def train_jobs(out: Path) -> list[Job]:
    """A training step against Llama."""
    options = [word for name, value in TRAIN_STEP.items() for word in (f"--{name}", value)]
    return [Job("train_step", ["benchmarks/train_step.py", "--device", "cuda", "--out", str(out), *options])]


PARTS = {"test": test_jobs, "bench": bench_jobs, "train": train_jobs}


def about() -> dict[str, str]:
    """The device, its driver and the versions of what runs on it; empty where it cannot be known."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = ""
    facts = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "driver": driver,
        "cuda": torch.version.cuda or "",
        "python": sys.version.split()[0],
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = ""
    return facts


def run(job: Job, seconds: float, log: Path) -> dict:
    """Run a job for at most ``seconds``; its output goes to ``log`` and, last lines, to the terminal."""
    command = [sys.executable, *job.command]
    if job.takes_budget:
        command += ["--budget", f"{0.65 * seconds:.0f}"]  # so that the case then running can end
    paths = [str(ROOT / "kernels"), str(ROOT / "laws"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    text = log.read_text(errors="replace")
    if status == 5 and job.name == "tests":
        status = "no test was selected"
    missing = re.findall(r"^ModuleNotFoundError: No module named '([\w.]+)'", text, re.M)
    if status == 1 and missing and job.name != "tests":
        outcome = f"skipped: {missing[-1]} is not installed"
    else:
        outcome = "passed" if status == 0 else f"failed: {status}"
    print("\n".join(text.splitlines()[-40:]), flush=True)
    last = text.strip().splitlines()[-1:]
    return {
        "job": job.name,
        "outcome": outcome,
        "seconds": round(time.monotonic() - start, 1),
        "last_line": "".join(last)[:200],
    }


def run_part(name: str, out: Path, minutes: float, only: list[str] | None, facts: dict[str, str]) -> list[dict]:
    """Run the jobs of a part in at most ``minutes``, writing ``gpu_<name>.json`` before the first and after each."""
    jobs = [job for job in PARTS[name](out) if not only or job.name in only]
    deadline = time.monotonic() + 60 * minutes
    results: list[dict] = []
    for i, job in enumerate(jobs):
        write(out / f"gpu_{name}.json", facts, results)
        share = (deadline - time.monotonic()) * job.weight / sum(j.weight for j in jobs[i:])
        print(f"==== {job.name}, at most {share:.0f} s", flush=True)
        results.append(run(job, max(share, 1), out / "logs" / f"{job.name}.txt"))
        write(out / f"gpu_{name}.json", facts, results)
    return results


def write(path: Path, facts: dict[str, str], results: list[dict]) -> None:
    """The outcomes so far, with the machine."""
    path.write_text(json.dumps({"about": facts, "jobs": results}, indent=2) + "\n")


def main() -> int:
    """Run the parts and return 1 if any job failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="by default all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.5, help="time for each part")
    parser.add_argument("--only", nargs="+", help="names of jobs: tests, an op, train_step")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this command is for a machine with a GPU")
    out = args.out.resolve()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    facts = about()
    results = [result for part in args.part for result in run_part(part, out, args.minutes, args.only, facts)]
    if not results:
        parser.error("--only names no job of these parts")
    print("\n" + "\n".join(f"{r['job']:24} {r['seconds']:7.1f} s  {r['outcome']}" for r in results))
    return int(any(r["outcome"].startswith("failed") for r in results))


if __name__ == "__main__":
    sys.exit(main())
