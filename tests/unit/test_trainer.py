"""The training loop: gradient accumulation, logs, and what happens when something is wrong."""

import gzip
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from run_factory import make_sources, run_until, trainer

from megamm.errors import InputError, RunError
from megamm.training import run_dir


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_sources(tmp_path_factory.mktemp("data"))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_contract_says(data, tmp_path):
    result = trainer(data, tmp_path / "run", **{"eval.every": 6, "eval.swap_images": True}).run()
    for name in ("config.yaml", "run.json", "metrics.jsonl", "tensorboard", "checkpoints/latest", "result.json"):
        assert (tmp_path / "run" / name).exists()
    steps = [r["step"] for r in records(tmp_path / "run") if "loss" in r]
    assert steps == [4, 8, 12]
    last = [r for r in records(tmp_path / "run") if "loss" in r][-1]
    assert {
        "loss/caption",
        "loss/text",
        "grad_norm",
        "tokens_per_second",
        "flops_per_second",
        "mfu",
        "loader_wait",
    } <= (set(last))
    assert [r["step"] for r in records(tmp_path / "run") if "val/text/loss" in r] == [6, 12]
    assert set(result["losses"]) == {"caption", "text"} and set(result["losses_swapped"]) == {"caption"}
    assert result["loss"] == pytest.approx(sum(v["loss"] for v in result["losses"].values()) / 2)
    assert result["flops"] == 6 * result["params"] * result["tokens"]
    assert 0 < result["tokens"] <= 12 * 8 * 64


@pytest.mark.parametrize("architecture", ["early", "late"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(data, tmp_path, architecture):
    """The denominator is the number of labels of the global batch, not of each part."""
    parameters = []
    for rows in (8, 3):
        run = trainer(data, tmp_path / str(rows), **{"model.architecture": architecture, "train.micro_rows": rows})
        run.run()
        parameters.append([p.detach() for p in run.model.parameters()])
    for whole, parts in zip(*parameters, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5)


def test_an_exploding_run_stops_with_one_clear_error(data, tmp_path):
    with pytest.raises(RunError, match=r"loss nan.*between steps 1 and 2.*Lower optimizer\.lr"):
        trainer(data, tmp_path / "run", **{"optimizer.lr": 1e38, "optimizer.clip": 0, "train.log_every": 1}).run()
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_run_directory_belongs_to_one_config(data, tmp_path):
    trainer(data, tmp_path / "run").run()
    with pytest.raises(InputError, match=r"optimizer\.lr: 0\.003 -> 0\.004.*train\.run_dir"):
        trainer(data, tmp_path / "run", **{"optimizer.lr": 0.004}).run()
    again = trainer(data, tmp_path / "run", **{"data.workers": 1, "train.log_every": 1}).run()
    assert again == json.loads((tmp_path / "run" / "result.json").read_text())


def test_a_second_process_is_kept_out(tmp_path):
    with run_dir.lock(tmp_path):
        second = run_dir.lock(tmp_path, patience=0.1)
        with pytest.raises(RunError, match="another process is training here"):
            second.__enter__()


def test_missing_sources_and_branch_points_are_named(data, tmp_path):
    with pytest.raises(InputError, match=r"data\.sources: empty"):
        trainer(data, tmp_path / "run", **{"data.sources": "{}"})
    trainer(data, tmp_path / "trunk", **{"schedule.cooldown": "none", "checkpoint.every": 0}).run()
    with pytest.raises(InputError, match=r"train\.branch_from: .*step-00000010 does not exist"):
        trainer(data, tmp_path / "run", **{"train.branch_from": tmp_path / "trunk"}).run()


def test_a_shard_that_is_cut_under_a_run_is_named(tmp_path):
    """Reading past the end of a memory map would kill the process."""
    data = make_sources(tmp_path)
    run, shard = trainer(data, tmp_path / "run"), tmp_path / "text" / "train" / "shard-00000.arrow"
    train_step = run.train_step

    def cut_after_two_steps(batches):
        if run.step == 2:
            os.truncate(shard, 4096)
        return train_step(batches)

    run.train_step = cut_after_two_steps
    with pytest.raises(InputError, match=r"text/train/shard-00000\.arrow: damaged or cut short, it has 4096 bytes"):
        run.run()


def test_a_loader_process_that_dies_is_named(data, tmp_path):
    run = trainer(data, tmp_path / "run", **{"data.workers": 1, "data.prefetch": 1})
    train_step = run.train_step

    def kill_after_two_steps(batches):
        if run.step == 2:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
        return train_step(batches)

    run.train_step = kill_after_two_steps
    with pytest.raises(RunError, match=r"a loader process died \(Killed\).*Lower data\.workers"):
        run.run()


def test_bfloat16_trains(data, tmp_path):
    exact = trainer(data, tmp_path / "fp32").run()
    low = trainer(data, tmp_path / "bf16", **{"train.dtype": "bfloat16"}).run()
    assert low["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_a_profile_of_some_steps(data, tmp_path):
    trainer(data, tmp_path / "run", **{"train.steps": 4, "train.profile_steps": "[2, 3]"}).run()
    assert {file.name for file in (tmp_path / "run" / "profile").iterdir()} == {"rank-0.json.gz", "rank-0.txt"}
    events = json.loads(gzip.decompress((tmp_path / "run" / "profile" / "rank-0.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step") for event in events) == 2
    assert "Self CPU" in (tmp_path / "run" / "profile" / "rank-0.txt").read_text()
    # Of steps that the run does not have, or had before it was resumed, the rest.
    late = {"train.steps": 4, "train.profile_steps": "[4, 9]"}
    trainer(data, tmp_path / "late", **late).run()
    assert (tmp_path / "late" / "profile" / "rank-0.txt").exists()
    broken = {"train.steps": 7, "train.profile_steps": "[2, 7]"}
    run_until(trainer(data, tmp_path / "broken", **broken), 6)
    shutil.rmtree(tmp_path / "broken" / "profile")
    trainer(data, tmp_path / "broken", **broken).run()
    assert (tmp_path / "broken" / "profile" / "rank-0.txt").exists()
    with pytest.raises(InputError, match=r"train\.profile_steps: \[3, 2\] is not \[first, last\]"):
        trainer(data, tmp_path / "other", **{"train.profile_steps": "[3, 2]"})


def test_determinism_is_asked_of_torch_and_changes_nothing_here(data, tmp_path):
    usual = trainer(data, tmp_path / "usual").run()
    assert not torch.are_deterministic_algorithms_enabled()
    strict = trainer(data, tmp_path / "strict", **{"train.deterministic": True})
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert strict.run()["losses"] == usual["losses"]
    finally:
        torch.use_deterministic_algorithms(False)
