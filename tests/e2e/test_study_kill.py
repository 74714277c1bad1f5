"""A study killed with -9 ten times ends in the results of an undisturbed one; failures stop nothing else."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from dataset_factory import make_dataset
from killing import environment, outcome, run, run_killed

TOOL = Path(__file__).parents[2] / "tools" / "run_study.py"
STEP = 4 * 160
SHORT, LONG = 40 * STEP, 80 * STEP


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A study of two ladders of two budgets and a single run."""
    folder = tmp_path_factory.mktemp("study")
    for name, kind in (("pairs", "caption"), ("pages", "interleaved")):
        make_dataset(folder / name, kind=kind, num_documents=200)
    values = {
        "name": "tiny",
        "base": {
            "model": {"depth": 2, "head_dim": 16, "hidden_multiple": 16},
            "data": {
                "sources": {name: {"path": str(folder / name)} for name in ("pairs", "pages")},
                "row_length": 160,
                "window_tokens": 2000,
            },
            "schedule": {"warmup_steps": 10, "cooldown_fraction": 0.25},
            "train": {"batch_rows": 4, "log_every": 3},
            "eval": {"rows": 8},
            "checkpoint": {"every": 10, "keep": 1, "final": False},
        },
        "architectures": ["early", "late"],
        "widths": [32],
        "tokens": [SHORT, LONG],
        "baselines": [{"architecture": "text", "width": 32, "tokens": SHORT}],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(study: Path, out: str) -> list:
    return [sys.executable, TOOL, study, "--out", study.parent / out, "--jobs", "2"]


@pytest.fixture(scope="module")
def undisturbed(study) -> tuple[Path, float]:
    """Its folder, and the seconds that it took."""
    return study.parent / "undisturbed", run(command(study, "undisturbed"), study.parent / "log.txt")


def run_dirs(out: Path) -> list[Path]:
    return [Path(run["dir"]) for run in json.loads((out / "study.json").read_text())["runs"]]


@pytest.mark.slow
def test_a_branch_equals_a_run_from_the_start(study, undisturbed, tmp_path):
    out, _ = undisturbed
    ladder = out / "runs" / "late-w0032-default"
    branch = ladder / f"{ladder.name}-t{LONG}"
    config = yaml.safe_load((ladder / f"{branch.name}.yaml").read_text())
    config["train"] |= {"run_dir": str(tmp_path / branch.name), "branch_from": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run([sys.executable, "-m", "megamm.train", "--config", tmp_path / "config.yaml"], tmp_path / "log.txt")
    result, records = outcome(tmp_path / branch.name)
    assert outcome(branch) == (result, [record for record in records if record["step"] > 60])


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_the_same(study, undisturbed):
    out, seconds = undisturbed
    root = study.parent
    ended, starts = run_killed(
        lambda n: command(study, f"killed-{n}"), random.Random(2), 10, 0.4 * seconds, root / "log.txt"
    )
    assert starts == 10 + len(ended)
    names = run_dirs(out)
    assert len(names) == 7
    for attempt in ended:
        killed = root / f"killed-{attempt}"
        assert run_dirs(killed) == names
        for name in names:
            assert outcome(killed / name) == outcome(out / name), name
        assert {r["status"] for r in json.loads((killed / "study.json").read_text())["runs"]} == {"finished"}


@pytest.mark.slow
def test_finished_runs_are_skipped_and_failures_are_reported(study, undisturbed):
    out, _ = undisturbed
    again = study.parent / "again"
    shutil.copytree(out, again)
    results = {name: (again / name / "result.json").stat().st_mtime_ns for name in run_dirs(again)}
    # The trunk of `early` is of other settings; one branch of `late` finds no checkpoint early enough in its trunk.
    early, late = (again / "runs" / f"{a}-w0032-default" for a in ("early", "late"))
    trunk, branch = early / f"{early.name}-trunk", late / f"{late.name}-t{SHORT}"
    config = (trunk / "config.yaml").read_text()
    (trunk / "config.yaml").write_text(config.replace("beta1: 0.9\n", "beta1: 0.8\n"))
    shutil.rmtree(early / f"{early.name}-t{LONG}")
    shutil.rmtree(branch)
    shutil.rmtree(late / f"{late.name}-trunk" / "checkpoints" / "step-00000030")
    # Run directories keep the path of their trunk, so that a moved study needs it put right.
    for path in again.glob("runs/*/*/config.yaml"):
        path.write_text(path.read_text().replace(str(out), str(again)))
    done = subprocess.run(command(study, "again"), capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    runs = {r["name"]: r for r in json.loads((again / "study.json").read_text())["runs"]}
    failed = {name: r["reason"] for name, r in runs.items() if r["status"] == "failed"}
    assert "finished with other settings (optimizer.beta1: 0.8 -> 0.9)" in failed.pop(trunk.name)
    assert failed.pop(f"{early.name}-t{LONG}") == "not run, because its trunk failed"
    assert not failed
    anew, _ = outcome(branch)
    assert anew == outcome(out / "runs" / late.name / branch.name)[0], "trained from the start, with the same numbers"
    for name, r in runs.items():
        assert name in done.stdout
        if name == branch.name:
            continue
        if r["status"] == "finished":
            assert (again / r["dir"] / "result.json").stat().st_mtime_ns == results[Path(r["dir"])]
        else:
            assert f"{name}: {r['reason']}" in done.stderr
    assert "2 of 7 runs failed" in done.stderr


@pytest.mark.slow
def test_a_process_that_breaks_down_costs_one_run(study, undisturbed):
    out, _ = undisturbed
    broken = study.parent / "broken"
    process = subprocess.Popen(command(study, "broken"), env=environment(), stderr=subprocess.PIPE, text=True)
    ladder, name = "late-w0032-default", f"late-w0032-default-t{SHORT}"
    try:
        while not (broken / "runs" / ladder / name / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(_pid_of(f"{name}.yaml", str(broken)), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert f"{name}: killed by signal 9" in errors
    states = {r["name"]: r["status"] for r in json.loads((broken / "study.json").read_text())["runs"]}
    assert [run for run, state in states.items() if state != "finished"] == [name]
    longest = Path("runs") / ladder / f"{ladder}-t{LONG}"
    assert outcome(broken / longest) == outcome(out / longest)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_study_told_to_stop_saves_what_is_in_training(study, undisturbed, number, code):
    out, _ = undisturbed
    name = f"stopped-{code}"
    stopped = study.parent / name
    process = subprocess.Popen(command(study, name), env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        while not list(stopped.glob("runs/*/*/metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert "again to go on" in errors and "Traceback" not in errors
    # What was in training has saved: the last line of each log is no further than its newest checkpoint.
    logs = list(stopped.glob("runs/*/*/metrics.jsonl"))
    for path in logs:
        if (path.parent / "result.json").exists():
            continue
        saved = max(int(p.name[5:]) for p in path.parent.glob("checkpoints/step-*[0-9]"))
        assert saved >= max((json.loads(line)["step"] for line in path.read_text().splitlines()), default=1)
    run(command(study, name), study.parent / "log.txt")
    for run_dir in run_dirs(out):
        assert outcome(stopped / run_dir) == outcome(out / run_dir), run_dir


@pytest.mark.slow
def test_training_ends_with_the_study(study):
    values = yaml.safe_load(study.read_text())
    values["tokens"] = [50 * LONG, 100 * LONG]  # minutes, so that training does not end by itself
    long = study.with_name("long.yaml")
    long.write_text(yaml.safe_dump(values))
    out = study.parent / "orphans"
    process = subprocess.Popen(command(long, "orphans"), env=environment(), stderr=subprocess.DEVNULL)
    try:
        while not list(out.glob("runs/*/*/metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.01)
        group = os.getpgid(_pid_of("trunk.yaml", str(out)))
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 30  # a busy machine takes its time
    while _members(group):
        assert time.monotonic() < deadline, "training goes on without its study"
        time.sleep(0.05)


def _members(group: int) -> list[Path]:
    """Processes of a group that are not yet dead, loader processes too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(") ")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(path)
    return found


def _pid_of(*parts: str) -> int:
    """The process that has all ``parts`` in its command line and trains."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text()
        except OSError:
            continue
        if "megamm.study.child" in line and all(part in line for part in parts):
            return int(path.parent.name)
    raise AssertionError("no such process")
