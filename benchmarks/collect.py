#!/usr/bin/env python
"""Seconds and memory that it takes to collect run directories into a table."""

import json
import resource
import tempfile
import time
from pathlib import Path

from megamm_laws.arguments import ArgumentParser
from megamm_laws.runs.collect import collect

from megamm.config import load
from megamm.errors import exit_on_error
from megamm.settings import to_yaml

RESULT = {"architecture": "early", "mixture": "45-45-10", "params": 10**6, "params_active": 10**6, "tokens": 4 * 10**7}


def write_runs(root: Path, runs: int) -> None:
    """Finished run directories, 50 to a folder, with the settings that a run writes."""
    text = to_yaml(load(None, ["--model.vocab_size", "32000", "--train.steps", "100"]))
    for i in range(runs):
        folder = root / f"ladder-{i // 50}" / f"run-{i}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(text)
        losses = {source: {"loss": 3.0 + i * 1e-4} for source in ("text", "caption", "interleaved")}
        result = RESULT | {
            "name": f"run-{i}",
            "loss": 3.0 + i * 1e-4,
            "losses": losses,
            "flops": 2.4e14,
            "trunk": False,
        }
        (folder / "result.json").write_text(json.dumps(result))


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3850, help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder), arguments.runs)
        begin = time.perf_counter(), time.process_time()
        rows, _ = collect([folder])
        seconds, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(rows)} runs: {seconds:.1f} s ({cpu:.1f} s of CPU), at most {memory:.0f} MiB")


if __name__ == "__main__":
    exit_on_error(main)
