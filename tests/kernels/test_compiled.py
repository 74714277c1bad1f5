"""Every kernel compiles for an H100, on machines without one, no worse than kernels/bench/results says."""

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from megamm_kernels import dispatch

BENCH = Path(__file__).parents[2] / "kernels" / "bench"


def rows(path: Path) -> list[dict]:
    """Lines of a table; launches of the same kernel at the same shape are numbered."""
    seen: Counter = Counter()
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        launch = row["arch"], row["op"], row["shape"], row["kernel"]
        row["launch"] = (*launch, seen[launch])
        seen[launch] += 1
    return found


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
def test_kernels_of_main_shapes_compile_and_lose_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, BENCH / "compiled.py", "--shapes", "1", "--arch", "sm_90", "--out", tmp_path / "now.csv"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    now, table = rows(tmp_path / "now.csv"), {row["launch"]: row for row in rows(BENCH / "results" / "compiled.csv")}
    counts = {"rms_norm": 3, "swiglu": 2, "qk_norm_rope": 2, "multimodal_embedding": 6, "interval_attention": 3}
    assert Counter(row["op"] for row in now) == counts | {"linear_cross_entropy": 4, "grouped_experts": 7}
    for row in now:
        assert row["spilled_bytes"] == "0", row
        recorded = table[row["launch"]]
        if row["triton"] == recorded["triton"]:  # another compiler may trade one for the other
            assert int(row["programs"]) >= int(recorded["programs"]), (row, recorded)
            assert int(row["loop_products"]) >= int(recorded["loop_products"]) > 0 or recorded["loop_products"] == "0"
