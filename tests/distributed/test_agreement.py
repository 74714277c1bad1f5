"""What one rank finds, all ranks end with: at once, with the same error, and with nothing half-written."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from dataset_factory import make_dataset
from ranks import run_ranks
from run_factory import flip_bit, make_sources, run_until, trainer

from megamm.errors import InputError, RunError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_sources(tmp_path_factory.mktemp("data"))


def attempt(data: Path, run_dir: Path, work: str, options: dict) -> tuple[int, str, float]:
    """Run on this rank, with what ``work`` does to it; returns the exit code, the message and the seconds."""
    began = time.monotonic()
    try:
        WORK[work](data, run_dir, options)
    except (InputError, RunError, OSError) as error:
        code = 2 if isinstance(error, InputError) else 1
        return code, str(error), time.monotonic() - began
    return 0, "", time.monotonic() - began


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def plain(data, run_dir, options):
    trainer(data, run_dir, **options).run()


def own_folders(data, run_dir, options):
    """As without a shared disk: the same relative path from different places."""
    place = run_dir / f"node{rank()}"
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    trainer(data, Path("run"), **options).run()


def own_data(data, run_dir, options):
    trainer(data if rank() == 0 else data.parent / "copy", run_dir, **options).run()


def fails_at_step_2(data, run_dir, options):
    """Rank 1's loader fails in the third step."""
    run = trainer(data, run_dir, **options)
    if rank() == 1:
        dataset = run.datasets[0]
        read, run.datasets[0].__class__ = type(dataset).__getitem__, type("Failing", (type(dataset),), {})
        run.datasets[0].__class__.__getitem__ = lambda self, i: read(self, i) if run.step < 2 else fail()
    run.run()


def fail():
    raise RunError("document 'x' is damaged")


def log_fails(data, run_dir, options):
    """Rank 0 alone writes the log."""
    run = trainer(data, run_dir, **options)
    record = run._record

    def full(*arguments):
        if rank() == 0:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        return record(*arguments)

    run._record = full
    run.run()


def save_fails(data, run_dir, options):
    """Rank 1's disk is full."""
    import resource

    run = trainer(data, run_dir, **options)
    begin = run._begin

    def fill():
        result = begin()
        if rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        return result

    run._begin = fill
    run.run()


WORK = {f.__name__: f for f in (plain, own_folders, own_data, fails_at_step_2, log_fails, save_fails)}


def both(data: Path, run_dir: Path, work: str, **options) -> tuple[int, str]:
    """Exit code and message, equal on two ranks."""
    found = run_ranks(attempt, 2, data, run_dir, work, options, timeout=600)
    assert found[0][:2] == found[1][:2]
    assert abs(found[0][2] - found[1][2]) < 10
    return found[0][:2]


@pytest.mark.parametrize("where", ["nowhere", "on rank 0", "on rank 1"])
def test_folders_that_differ_are_one_error(data, tmp_path, where):
    if where != "nowhere":
        run_until(trainer(data, tmp_path / f"node{where[-1]}" / "run"), 7)
    code, message = both(data, tmp_path, "own_folders")
    assert code == 2 and message.startswith(f"train.run_dir: {tmp_path}/node1/run of rank 1")
    assert not list(tmp_path.glob("node*/run/checkpoints/step-00000012"))


def test_data_that_differ_are_one_error(data, tmp_path):
    shutil.copytree(data, data.parent / "copy")
    make_dataset(data.parent / "copy" / "text", kind="text", num_documents=120, seed=7)
    code, message = both(data, tmp_path / "run", "own_data")
    assert code == 2 and "data.sources.text.path" in message and "other data on rank 1 than on rank 0" in message


FAILURES = {
    "fails_at_step_2": "document 'x' is damaged",
    "log_fails": "metrics.jsonl: the disk is full",
    "save_fails": "step-00000005: checkpoint not written ([Errno 27] File too large",
}


@pytest.mark.parametrize(("work", "said"), FAILURES.items(), ids=FAILURES)
def test_a_failure_on_one_rank_ends_all(data, tmp_path, work, said):
    code, message = both(data, tmp_path / "run", work)
    assert code == 1 and said in message


def test_a_damaged_checkpoint_is_passed_over_by_all(data, tmp_path):
    run_until(trainer(data, tmp_path / "run"), 11)
    flip_bit(tmp_path / "run" / "checkpoints" / "step-00000010" / "__0_0.distcp")
    assert both(data, tmp_path / "run", "plain") == (0, "")
    trainer(data, tmp_path / "alone").run()
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "alone")]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)
    assert (tmp_path / "run" / "checkpoints" / "aside-step-00000010-1").exists()


def test_a_run_goes_on_with_another_number_of_ranks(data, tmp_path):
    """From one rank to two with another axis, and back to one."""
    run = tmp_path / "run"
    run_until(trainer(data, run), 6)
    both(data, run, "plain", **{"train.steps": 12, "parallel.tensor": 2, "checkpoint.keep": 9})
    (run / "result.json").unlink()
    (run / "checkpoints" / "latest").write_text("step-00000010\n")
    result = trainer(data, run).run()
    trainer(data, tmp_path / "alone").run()
    alone = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert result["loss"] == pytest.approx(alone["loss"], rel=1e-5) and result["tokens"] == alone["tokens"]
