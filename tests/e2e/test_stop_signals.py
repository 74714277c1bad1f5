"""SIGTERM or SIGUSR1 at random moments: training saves, ends with exit code 75, and goes on to the same losses."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from dataset_factory import make_dataset
from killing import environment, outcome, run

from megamm.study.launchers import NodeCall
from megamm.training.signals import EXIT_CODE, STOP_SIGNALS, StopFlag

STOPS = 2


def write_config(folder: Path) -> Path:
    make_dataset(folder / "pairs", kind="caption", num_documents=200)
    config = {
        "model": {"width": 32, "depth": 2, "head_dim": 16, "hidden_multiple": 16},
        "data": {"sources": {"pairs": {"path": str(folder / "pairs")}}, "row_length": 64, "window_tokens": 2000},
        "schedule": {"warmup_steps": 10},
        "train": {"steps": 150, "batch_rows": 4, "log_every": 3},
        "eval": {"rows": 4},
        # No periodic checkpoint: what is there was saved because of a signal.
        "checkpoint": {"every": 0, "keep": 1, "final": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def steps_logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_run_goes_on_where_it_was(tmp_path, ranks):
    config, log = write_config(tmp_path), tmp_path / "log.txt"
    launcher = ["-m", "megamm.launch", "--nproc-per-node=2"] if ranks == 2 else []

    def command(name: str) -> list[str]:
        arguments = ["-m", "megamm.train", "--config", config, "--train.run_dir", tmp_path / name / "run"]
        return list(map(str, [sys.executable, *launcher, *arguments]))

    run(command("unbroken"), log)
    rng, saved = random.Random(ranks), []
    stopped = tmp_path / "stopped" / "run"
    for number in rng.choices(STOP_SIGNALS, k=STOPS):
        seen = steps_logged(stopped)
        with log.open("a") as file:
            process = subprocess.Popen(command("stopped"), stdout=file, stderr=file, env=environment())
        while steps_logged(stopped) <= seen and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(number)
        assert process.wait(timeout=120) == EXIT_CODE, log.read_text()[-3000:]
        (pointer,) = (stopped / "checkpoints").glob("step-*[0-9]")
        saved.append(pointer.name)
    assert saved == sorted(set(saved)), "each stop saves what it has trained"
    run(command("stopped"), log)
    assert outcome(stopped) == outcome(tmp_path / "unbroken" / "run")


@pytest.mark.slow
def test_a_slurm_job_whose_time_is_up_saves_and_goes_on_when_it_is_queued_again(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    values = yaml.safe_load(write_config(tmp_path).read_text())
    values["train"]["run_dir"] = str(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    log = tmp_path / "log.txt"
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=60)
    job = executor.submit(NodeCall([str(tmp_path / "run.yaml")], log, ranks=1))
    while not steps_logged(tmp_path / "run"):
        assert not job.done()
        time.sleep(0.05)
    controller = job._process.pid
    (task,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)  # what Slurm sends shortly before the time is up
    assert job.results() == [0]
    assert log.read_text().count("told to stop, saved at step") == 1
    assert (tmp_path / "run" / "result.json").exists()


def test_signals_have_their_former_meaning_outside_of_training():
    flag, before = StopFlag(), signal.getsignal(signal.SIGTERM)
    with flag.listen():
        assert not flag.raised
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.raised
    assert signal.getsignal(signal.SIGTERM) is before
