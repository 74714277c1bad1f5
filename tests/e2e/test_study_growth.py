"""A finished study grows, shrinks and is mended; what it then holds equals a study that was so from the start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dataset_factory import make_dataset
from killing import environment, outcome
from megamm_laws.runs.collect import collect

TOOL = Path(__file__).parents[2] / "tools" / "run_study.py"
STEP = 4 * 48
LADDER = "early-w0032-default"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("growing")
    make_dataset(folder / "pairs", kind="caption", num_documents=200)
    return folder


def study(data: Path, steps: list[int], widths: dict | list, **base) -> dict:
    values = {
        "model": {"depth": 1, "head_dim": 16, "hidden_multiple": 16},
        "data": {"sources": {"pairs": {"path": str(data / "pairs")}}, "row_length": 48, "window_tokens": 2000},
        "schedule": {"warmup_steps": 4, "cooldown_fraction": 0.25},
        "train": {"batch_rows": 4, "log_every": 2},
        "eval": {"rows": 4},
        "checkpoint": {"every": 0, "keep": 1, "final": False},
    }
    return {
        "name": "tiny",
        "base": values | base,
        "architectures": ["early"],
        "widths": widths,
        "tokens": [n * STEP for n in steps],
    }


def train(values: dict, out: Path) -> subprocess.CompletedProcess:
    out.mkdir(exist_ok=True)
    (out / "study.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, TOOL, out / "study.yaml", "--out", out]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment())


def states(out: Path) -> dict[str, str]:
    return {run["name"]: run["status"] for run in json.loads((out / "study.json").read_text())["runs"]}


def aside(out: Path) -> dict[str, str]:
    about = json.loads((out / "study.json").read_text())
    assert about["num_set_aside"] == len(about["set_aside"])
    return {entry["name"]: entry["reason"] for entry in about["set_aside"]}


def folder(out: Path, name: str) -> Path:
    return out / "runs" / name.rpartition("-")[0] / name


@pytest.mark.slow
def test_a_grown_study_equals_one_that_was_so_from_the_start(data, tmp_path):
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    done = train(study(data, [16, 32], [32]), grown)
    assert done.returncode == 0, done.stderr
    before = {name: (folder(grown, name) / "result.json").read_bytes() for name in states(grown)}
    # Longer, in between, shorter than all, and a further width.
    for out in (grown, whole):
        done = train(study(data, [8, 16, 24, 32, 64], [32, 48]), out)
        assert done.returncode == 0, done.stderr
    assert states(grown) == states(whole) and len(states(grown)) == 12
    assert set(states(grown).values()) == {"finished"}
    assert not aside(grown)
    for name in states(whole):
        result, records = outcome(folder(whole, name))
        found, logged = outcome(folder(grown, name))
        assert found == result, name
        # A branch that left its trunk earlier has logged the steps between, too; a trunk its first final validation.
        records, logged = ([r for r in rs if "loss" in r] for rs in (records, logged))
        assert [r for r in logged if r["step"] >= records[0]["step"]] == records, name
    for name in (f"{LADDER}-t{16 * STEP}", f"{LADDER}-t{32 * STEP}"):
        assert (folder(grown, name) / "result.json").read_bytes() == before[name], "a kept run was trained again"
    trunk, between = folder(grown, f"{LADDER}-trunk"), folder(grown, f"{LADDER}-t{24 * STEP}")
    assert json.loads((trunk / "result.json").read_text())["steps"] == 48
    assert outcome(between)[1][0]["step"] == 14, "it leaves the trunk at step 12, the last point kept before 18"

    # One budget and the further width less: kept on disk, counted, and not in the table.
    done = train(study(data, [8, 24, 32, 64], [32]), grown)
    assert done.returncode == 0, done.stderr
    gone = {f"{LADDER}-t{16 * STEP}", *(name for name in states(whole) if "w0048" in name)}
    assert aside(grown) == dict.fromkeys(gone, "no longer in the study")
    assert f"{len(gone)} runs are set aside" in done.stderr
    rows, left_out = collect([grown])
    assert {row["run"] for row in rows} == {n for n in states(grown) if not n.endswith("trunk")}
    assert sum("set aside by its study: no longer in the study" in line for line in left_out) == len(gone)

    # And back again: nothing is trained.
    times = {name: (folder(grown, name) / "result.json").stat().st_mtime_ns for name in states(whole)}
    assert train(study(data, [8, 16, 24, 32, 64], [32, 48]), grown).returncode == 0
    assert times == {name: (folder(grown, name) / "result.json").stat().st_mtime_ns for name in states(whole)}
    assert states(grown) == states(whole) and not aside(grown)


@pytest.mark.slow
def test_a_single_budget_becomes_a_ladder_and_a_ladder_a_single_budget(data, tmp_path):
    out, name = tmp_path / "out", f"{LADDER}-t{16 * STEP}"
    assert train(study(data, [16], [32]), out).returncode == 0
    first = (folder(out, name) / "result.json").read_bytes()
    assert json.loads(first)["branch_from"] is None
    done = train(study(data, [16, 32], [32]), out)
    assert done.returncode == 0, done.stderr
    assert list(states(out).values()) == ["finished"] * 3
    assert (folder(out, name) / "result.json").read_bytes() == first
    done = train(study(data, [32], [32]), out)
    assert done.returncode == 0, done.stderr
    assert states(out) == {f"{LADDER}-t{32 * STEP}": "finished"}
    assert aside(out).keys() == {name, f"{LADDER}-trunk"}


@pytest.mark.slow
def test_a_failed_run_does_not_block_the_mended_study(data, tmp_path):
    out, trunk = tmp_path / "out", f"{LADDER}-trunk"
    # It logs its first step before it fails: a run that never got so far leaves nothing to set aside.
    every_step = {"train": {"batch_rows": 4, "log_every": 1}}
    done = train(study(data, [16, 32], {32: {"optimizer": {"lr": 1e30}}}, **every_step), out)
    assert done.returncode == 1 and states(out)[trunk] == "failed"
    done = train(study(data, [16, 32], [32]), out)
    assert done.returncode == 0, done.stderr
    assert set(states(out).values()) == {"finished"}
    moved = out / "set_aside" / LADDER / f"{trunk}-1"
    assert aside(out).keys() == {moved.name} and "optimizer.lr: 1e+30 -> 0.0015" in aside(out)[moved.name]
    assert (moved / "metrics.jsonl").exists()
    # What is finished is not thrown away for other settings: the message says what can be done.
    done = train(study(data, [16, 32], {32: {"optimizer": {"lr": 1e-3}}}), out)
    assert done.returncode == 1
    assert "finished with other settings (optimizer.lr: 0.0015 -> 0.001)" in done.stderr
    assert "another --out" in done.stderr and "train.run_dir" not in done.stderr
    assert train(study(data, [16, 32], [32]), out).returncode == 0
