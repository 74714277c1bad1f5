"""The benchmarks' harness: figures, errors of peers, and every script at tiny size on the CPU."""

import csv
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

import table  # noqa: E402
from harness import Case, Provider, UnavailableError, Work, gradients, main, write_csv  # noqa: E402


def make(device, dtype):
    return torch.ones(64, device=device, dtype=dtype, requires_grad=True)


def missing(x):
    import no_such_module  # noqa: F401


def refuses(x):
    raise UnavailableError("not for this shape")


def run(tmp_path, *providers, extra=()):
    case = Case("tiny", Work(flops=64, bytes=512), make)
    with pytest.raises(SystemExit) as end:
        main("square", lambda quick: [case], providers, ["--out", str(tmp_path), "--device", "cpu", "--quick", *extra])
    with (tmp_path / "square.csv").open() as file:
        return end.value.code, {row["provider"]: row for row in csv.DictReader(file)}


def test_harness_writes_figures_and_reasons(tmp_path):
    ours = Provider("megamm", lambda x: gradients(lambda: (x * x).sum(), [x]))
    status, rows = run(tmp_path, ours, Provider("peer", missing), Provider("flex", refuses))
    assert status == 0
    assert float(rows["megamm"]["ms"]) > 0 and float(rows["megamm"]["share_of_ceiling"]) > 0
    assert rows["megamm"]["torch"] == torch.__version__ and rows["megamm"]["peak_mib"] == ""
    assert rows["peer"]["error"].startswith("not installed") and "not for this shape" in rows["flex"]["error"]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "square.png").stat().st_size > 0


def test_harness_fails_when_ours_fails_and_skips_when_out_of_time(tmp_path):
    status, _ = run(tmp_path, Provider("megamm", refuses))
    assert status == 1
    _, rows = run(tmp_path, Provider("peer", refuses), extra=("--budget", "0"))
    assert rows["peer"]["error"] == "skipped: out of time"


SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if "\nfrom harness import" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs_at_tiny_size(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--device", "cpu", "--quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCH / f"{script}.py"), run_name="__main__")
    assert not end.value.code
    with (tmp_path / f"{script}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row["ms"] for row in rows)
    assert all(row["ms"] for row in rows if row["provider"].startswith("megamm"))


def test_minor_peers_are_measured_last(tmp_path, capsys):
    def setup(x):
        return gradients(lambda: (x * x).sum(), [x])

    late = Provider("minor", setup, minor=True)
    run(tmp_path, late, Provider("compiled", setup, compiles=True), Provider("peer", setup), Provider("megamm", setup))
    printed = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("tiny")]
    assert printed == ["peer", "megamm", "compiled", "minor"]


def figures(provider, ms, device="H100", mode="forward+backward", **other):
    row = {"device": device, "op": "swiglu", "case": "hidden 8", "provider": provider, "mode": mode, "ms": ms}
    return row | {"share_of_ceiling": 0.5 / ms if ms else None} | other


def test_the_table_names_the_best_peer_and_counts_figures_of_gpus_alone(tmp_path):
    rows = [
        figures("megamm", 1.25),
        figures("megamm", 0.5, mode="forward"),
        figures("liger", 2.0),
        figures("torch.compile", 1.5),
        figures("eager", None, error="skipped: out of time"),
        figures("fast", 0.1, device="x86_64 CPU"),
        figures("megamm", None, case="hidden 9", error="RuntimeError"),
        figures("liger", 3.0, case="hidden 9"),
    ]
    write_csv(tmp_path / "swiglu.csv", rows)
    made = table.lines("swiglu", table.measured(tmp_path / "swiglu.csv"))
    assert made == [
        "| swiglu | hidden 8 | 1.25 ms | 1.5 ms, torch.compile | 40% | H100 |",
        "| swiglu | hidden 9 | not measured | 3 ms, liger | not measured | H100 |",
    ]
    write_csv(tmp_path / "swiglu.csv", [figures("megamm", 1.0, device="aarch64 CPU")])
    empty = table.lines("swiglu", table.measured(tmp_path / "swiglu.csv"))
    assert empty == ["| swiglu | all | not measured | not measured | not measured | |"]
    assert [line.split()[1] for line in table.table(tmp_path).splitlines()[2:]] == SCRIPTS


def test_the_readme_holds_the_table_of_the_results_on_record():
    root = BENCH.parents[1]
    page = (root / "kernels/README.md").read_text()
    assert table.replaced(page, table.table(root / "benchmarks/results")) == page
