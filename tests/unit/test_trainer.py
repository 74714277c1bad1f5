"""The training loop: gradient accumulation, logs, and what happens when something is wrong."""

import json
from pathlib import Path

import pytest
import torch
from dataset_factory import make_dataset

from megamm.config import load
from megamm.data.loader import Loader, build_plan
from megamm.errors import InputError, RunError
from megamm.trainer import Trainer
from megamm.training import run_dir
from megamm.training.evaluation import swap_images


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, kind in enumerate(("caption", "text")):
        make_dataset(folder / kind, kind=kind, num_documents=120, seed=seed)
    return folder


def trainer(data: Path, run_dir: Path, **overrides) -> Trainer:
    settings = {
        "model.width": 16, "model.depth": 1, "model.head_dim": 8, "model.hidden_multiple": 8,
        "data.row_length": 64, "data.window_tokens": 2000, "data.workers": 0,
        "data.sources": f"{{caption: {{path: {data}/caption}}, text: {{path: {data}/text}}}}",
        "optimizer.lr": 0.003, "schedule.warmup_steps": 3, "train.steps": 12, "train.batch_rows": 8,
        "train.log_every": 4, "train.device": "cpu", "train.run_dir": run_dir, "train.peak_flops": 1e12,
        "eval.rows": 4, "checkpoint.every": 5,
    } | overrides  # fmt: skip
    return Trainer(load(None, [f"--{key}={value}" for key, value in settings.items()]))


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
    with pytest.raises(InputError, match=r"train\.branch_from: .*step-00000010 does not exist"):
        trainer(data, tmp_path / "run", **{"train.branch_from": tmp_path / "trunk"}).run()


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    trainer(data, tmp_path / "run").run()
    (tmp_path / "run" / "result.json").unlink()
    shard = next((tmp_path / "run" / "checkpoints").glob("step-00000012/*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match="step-00000012: cannot be loaded"):
        trainer(data, tmp_path / "run").run()


def test_bfloat16_trains(data, tmp_path):
    exact = trainer(data, tmp_path / "fp32").run()
    low = trainer(data, tmp_path / "bf16", **{"train.dtype": "bfloat16"}).run()
    assert low["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_swapping_images_moves_every_image_and_nothing_else(data, tmp_path):
    run = trainer(data, tmp_path / "run")
    config = run.config.data
    plan = build_plan(run.datasets, [1.0, 1.0], config, cache_dir=tmp_path, num_rows=8)
    batch = next(iter(Loader(plan, run.datasets, config, global_batch_rows=8, end_step=1)))[0]
    swapped = swap_images(batch, 4)
    assert torch.equal(swapped.patches[4:], batch.patches[:-4]) and torch.equal(swapped.patches[:4], batch.patches[-4:])
    assert torch.equal(swapped.tokens, batch.tokens)
