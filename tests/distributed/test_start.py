"""The start of several ranks: an error is printed once, and no rank waits for one that refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_factory import make_dataset
from ranks import free_port

SETTINGS = """
model: {architecture: early, width: 16, depth: 1, head_dim: 8, hidden_multiple: 16}
data: {row_length: 48, window_tokens: 4000, workers: 0, sources: {caption: {path: %s}}}
schedule: {warmup_steps: 2}
train: {steps: 2, batch_rows: 4, log_every: 1, device: cpu, run_dir: %s}
eval: {rows: 2}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    make_dataset(folder / "data", kind="caption", num_documents=60)
    for name in "ab":
        (folder / f"{name}.yaml").write_text(SETTINGS % (folder / "data", folder / f"run-{name}"))
    return folder


def train(*by_rank: list[str]) -> tuple[list[int], list[str]]:
    """Run a process per list of arguments; returns exit codes and what each printed to stderr."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared = {**address, "WORLD_SIZE": str(len(by_rank)), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "megamm.train", *arguments],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, arguments in enumerate(by_rank)
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def test_an_error_of_the_config_is_printed_once(folder):
    codes, said = train(*[["--config", str(folder / "a.yaml"), "--model.wdth=3"]] * 2)
    assert codes == [2, 2]
    assert said[0].strip().endswith("a.yaml: model.wdth: unknown key; did you mean 'width'?") and said[1] == ""


def test_a_layout_that_does_not_fit_is_printed_once(folder):
    codes, said = train(*[["--config", str(folder / "a.yaml"), "--train.batch_rows=3"]] * 2)
    assert codes == [2, 2] and "train.batch_rows: 3" in said[0] and said[1] == ""


def test_what_one_rank_alone_finds_ends_all(folder):
    good = ["--config", str(folder / "a.yaml")]
    codes, said = train(good, [*good, "--data.sources.caption.path=/nowhere"])
    assert codes == [2, 2] and said[1] == ""
    assert "/nowhere/dataset.json: not found" in said[0] and "(on rank 1, but not on all ranks)" in said[0]
    assert not (folder / "run-a").exists()


def test_of_two_runs_the_good_one_is_trained_when_the_other_is_refused(folder):
    (folder / "run-b").mkdir()
    (folder / "run-b" / "config.yaml").write_text("model: {width: 32}\ntrain: {steps: 2}\n")
    (folder / "run-b" / "metrics.jsonl").write_text("{}\n")  # it was begun
    codes, said = train(*[["--config", str(folder / "b.yaml"), str(folder / "a.yaml")]] * 2)
    assert codes == [2, 2]
    text = "".join(said)
    assert text.count("run-b/config.yaml: made with other settings") == 1 and text.count("1 of 2 runs failed") == 1
    assert (folder / "run-a" / "result.json").exists() and not (folder / "run-b" / "result.json").exists()


def test_help_and_printed_config_come_from_one_rank(folder):
    run = [sys.executable, "-m", "megamm.train", "--config", str(folder / "a.yaml"), "--print_config"]
    for rank, lines in (("0", True), ("1", False)):
        environment = os.environ | {"RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        assert bool(done.stdout) == lines
