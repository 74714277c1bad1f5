"""All that needs a GPU, in one command: kernel tests, kernel benchmarks, a training step against Llama.

    python benchmarks/gpu.py [--out DIR] [--minutes 8.5] [--only PART ...]

A part that fails does not stop the others, but the exit status tells. A part whose imports are missing is skipped.
Every part may use an equal share, by weight, of the time that is left, so the whole ends in time; benchmarks are told
their share and leave out what would not fit. Results go to DIR: a CSV and a plot per op, train_step_cuda.csv and
.json, and gpu.json with every part's outcome; logs to DIR/logs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
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
WEIGHTS = {"tests": 7, "interval_attention": 3, "linear_cross_entropy": 2, "train_step": 3}
"""Shares of the time; 1 for all others."""


@dataclass
class Part:
    """One command; ``takes_budget`` if it can be told how long it may take."""

    name: str
    command: list[str]
    takes_budget: bool = False

    @property
    def weight(self) -> int:
        return WEIGHTS.get(self.name, 1)


def parts(out: Path) -> list[Part]:
    """What there is to run, in order."""
    tests = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels"]
    if find_spec("xdist"):
        tests += ["-n", "6"]  # most of the time goes into compiling kernels
    found = [Part("tests", tests)]
    for script in sorted((ROOT / "kernels/bench").glob("*.py")):
        if "\nfrom harness import" in script.read_text():
            command = [str(script), "--device", "cuda", "--out", str(out)]
            found.append(Part(script.stem, command, takes_budget=True))
    options = [word for name, value in TRAIN_STEP.items() for word in (f"--{name}", value)]
    command = ["benchmarks/train_step.py", "--device", "cuda", "--out", str(out), *options]
    return [*found, Part("train_step", command)]


def run(part: Part, seconds: float, log: Path) -> dict:
    """Run a part for at most ``seconds``; its output goes to ``log`` and, last lines, to the terminal."""
    command = [sys.executable, *part.command]
    if part.takes_budget:
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
    if status == 5 and part.name == "tests":
        status = "no test was selected"
    missing = re.findall(r"^ModuleNotFoundError: No module named '([\w.]+)'", text, re.M)
    if status == 1 and missing and part.name != "tests":
        outcome = f"skipped: {missing[-1]} is not installed"
    else:
        outcome = "passed" if status == 0 else f"failed: {status}"
    print("\n".join(text.splitlines()[-40:]), flush=True)
    return {"part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    """Run all parts and return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything")
    parser.add_argument("--only", nargs="+", help="names of parts: tests, an op, train_step")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this command is for a machine with a GPU")
    out, deadline = args.out.resolve(), time.monotonic() + 60 * args.minutes
    (out / "logs").mkdir(parents=True, exist_ok=True)
    todo = [part for part in parts(out) if not args.only or part.name in args.only]
    results = []
    for i, part in enumerate(todo):
        share = (deadline - time.monotonic()) * part.weight / sum(p.weight for p in todo[i:])
        print(f"==== {part.name}, at most {share:.0f} s", flush=True)
        results.append(run(part, max(share, 1), out / "logs" / f"{part.name}.txt"))
        (out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n" + "\n".join(f"{r['part']:24} {r['seconds']:7.1f} s  {r['outcome']}" for r in results))
    return int(any(r["outcome"].startswith("failed") for r in results))


if __name__ == "__main__":
    sys.exit(main())
