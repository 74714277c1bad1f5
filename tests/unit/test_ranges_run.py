"""What a range admits can be trained: runs of a few steps at the ends of the ranges that are small or quick."""

import json
import math

import pytest
from dataset_factory import make_dataset

from megamm.config import load
from megamm.errors import InputError, RunError
from megamm.trainer import Trainer
from megamm.training.divergence import diverged
from megamm.training.run_dir import check_settings

SETTINGS = [
    "--model={architecture: late, width: 16, depth: 1, head_dim: 8, hidden_multiple: 16}",
    "--data={row_length: 48, window_tokens: 4000, workers: 0}",
    "--schedule.warmup_steps=2",
    "--train={steps: 4, batch_rows: 2, log_every: 1, device: cpu}",
    "--eval.rows=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for kind in ("caption", "text"):
        make_dataset(folder / kind, kind=kind, num_documents=60)
    return folder


def config(data, run_dir, *options):
    sources = [f"--data.sources.{kind}.path={data / kind}" for kind in ("caption", "text")]
    return load(None, [*SETTINGS, *sources, f"--train.run_dir={run_dir}", *options])


LOW = """
    schedule.warmup_steps=0 schedule.cooldown_fraction=0 data.window_tokens=48 data.seed=0 eval.rows=1 eval.every=1
    data.sources.text.weight=1e-9 data.augment.crop_scale_min=0.001 checkpoint.every=1 checkpoint.keep=1
    optimizer.lr=1e-12 optimizer.beta1=0 optimizer.beta2=0 optimizer.eps=1e-30 optimizer.weight_decay=0
    optimizer.clip=1e-9 optimizer.vision_lr_factor=1e-9 model.rope_theta=1 model.norm_eps=1e-30 train.micro_rows=1
"""
HIGH = """
    schedule.warmup_steps=1e12 schedule.cooldown_fraction=1 data.window_tokens=1e15 data.seed=9223372036854775807
    data.sources.text.weight=1e9 optimizer.eps=1 optimizer.weight_decay=1 optimizer.clip=1e9
    optimizer.vision_lr_factor=1e6 model.rope_theta=1e12 model.norm_eps=1 train.seed=9223372036854775807
    train.micro_rows=1e9 train.log_every=1e12 eval.every=1e12 checkpoint.every=1e12 checkpoint.keep=1e9
"""


@pytest.mark.parametrize("options", [LOW, HIGH], ids=["low", "high"])
def test_the_ends_of_the_ranges_train(data, tmp_path, options):
    found = config(data, tmp_path / "run", *(f"--{option}" for option in options.split()))
    result = Trainer(found).run()
    assert math.isfinite(result["loss"]) and result["steps"] == 4
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


def test_advice_for_a_run_that_diverged_can_be_followed(data, tmp_path):
    found = config(data, tmp_path / "run", "--optimizer.lr=1e38", "--optimizer.clip=0")
    with pytest.raises(RunError):
        Trainer(found).run()
    error = diverged(found, "loss nan between steps 1 and 2")
    assert isinstance(error, RunError) and "\n" not in str(error)
    advice = str(error).partition("settings: ")[2].split()
    with pytest.raises(InputError, match=r"optimizer\.lr: 1e\+38"):  # not in the old folder
        lower = Trainer(config(data, tmp_path / "run", "--optimizer.clip=0", *advice[:2])).config
        check_settings(tmp_path / "run", lower)
    again = config(data, tmp_path / "run", "--optimizer.clip=0", *advice)
    assert again.optimizer.lr < found.optimizer.lr and not (tmp_path / again.train.run_dir).exists()
    Trainer(again)


def test_a_branch_that_diverged_needs_a_new_trunk(data, tmp_path):
    error = diverged(config(data, tmp_path / "branch", f"--train.branch_from={tmp_path / 'trunk'}"), "loss nan")
    advice = str(error).partition("settings: ")[2].split()
    run_dir, trunk = f"{tmp_path}/branch-lr0.0005", f"{tmp_path}/trunk-lr0.0005"
    assert advice[2:] == ["--train.run_dir", run_dir, "--train.branch_from", trunk]
