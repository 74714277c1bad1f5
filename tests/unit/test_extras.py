"""What only some settings need: 8-bit products, Weights & Biases, and the error where a package is missing."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from model_factory import model_config
from run_factory import make_sources, run_until, trainer
from torch import nn

from megamm import extras
from megamm.config import load
from megamm.dry_run import describe_run
from megamm.errors import InputError
from megamm.model.float8 import use_float8
from megamm.model.layers import FeedForward, Linear
from megamm.model.multimodal import MultimodalModel
from megamm.train import refusal
from megamm.training.metrics import read_metrics

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("data"))


def float8_linear(width: int, out: int, bias: bool = False) -> tuple[Linear, Linear]:
    """A layer, and one of the same weights whose product runs in 8 bits."""
    torch.manual_seed(0)
    plain, quantised = Linear(width, out, 0.1, bias), Linear(width, out, 0.1, bias)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.1)
    quantised.load_state_dict(plain.state_dict())
    use_float8(quantised, CPU)
    return plain, quantised


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as 8-bit floats hold it, with one scale: its largest magnitude becomes the largest number."""
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return (x.double() * scale).float().to(dtype).double() / scale


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_products_are_those_of_rounded_operands_whatever_the_number_of_rows(rows):
    """Forward and both gradients against float64; rows that fill up to 16 change nothing."""
    _, layer = float8_linear(32, 48, bias=True)
    x = torch.randn(rows, 32, requires_grad=True)
    grad = torch.randn(rows, 48)
    y = layer(x)
    y.backward(grad)
    x8, w8 = rounded(x.detach(), torch.float8_e4m3fn), rounded(layer.weight.detach(), torch.float8_e4m3fn)
    g8 = rounded(grad, torch.float8_e5m2)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.double(), x8 @ w8.T + layer.bias.double(), **close)
    torch.testing.assert_close(x.grad.double(), g8 @ w8, **close)
    torch.testing.assert_close(layer.weight.grad.double(), g8.T @ x8, **close)
    assert not torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))


def test_only_products_of_widths_that_fit_run_in_8_bits():
    plain, odd = float8_linear(24, 48)
    x = torch.randn(5, 24)
    assert torch.equal(plain(x), odd(x))
    model = MultimodalModel(model_config("late", width=32), seed=0)
    for block in model.all_blocks():
        use_float8(block, CPU)
    eight = {name for name, m in model.named_modules() if isinstance(m, Linear) and m.product is not Linear.product}
    assert {"blocks.0.attention.qkv", "blocks.0.feed_forward.down", "vision.blocks.0.attention.out"} <= eight
    assert all("blocks" in name for name in eight)
    assert not any(m.fused for m in model.modules() if isinstance(m, FeedForward))


@pytest.mark.parametrize("recompute", ["none", "per_op", "full"])
def test_training_in_8_bits_learns_as_in_32(data, tmp_path, recompute):
    """The final loss differs by less than 2%; recomputing activations changes nothing."""
    sizes = {"model.width": 32, "model.head_dim": 16, "model.hidden_multiple": 16, "train.steps": 40}
    losses = {}
    for fp8, how in (("true", recompute), ("true", "none"), ("false", "none")):
        run_dir = tmp_path / f"{fp8}-{how}"
        settings = sizes | {"train.fp8": fp8, "train.recompute": how, "checkpoint.every": 0}
        losses[fp8, how] = trainer(data, run_dir, **settings).run()["loss"]
    assert losses["true", recompute] == losses["true", "none"]
    assert losses["true", "none"] != losses["false", "none"]
    assert losses["true", "none"] == pytest.approx(losses["false", "none"], rel=0.02)


@pytest.mark.slow
def test_200_steps_in_8_bits_follow_those_in_32(data, tmp_path):
    """The mean loss of every tenth of the training differs by less than 1%."""
    # 8 rows of 61 are no multiple of 16 positions, so that every product is padded.
    sizes = {"model.width": 64, "model.head_dim": 32, "model.hidden_multiple": 16, "data.row_length": 61}
    means = {}
    for fp8 in ("true", "false"):
        settings = sizes | {"train.steps": 200, "train.fp8": fp8, "checkpoint.every": 0}
        trainer(data, tmp_path / fp8, **settings).run()
        losses = [record["loss"] for record in read_metrics(tmp_path / fp8 / "metrics.jsonl") if "loss" in record]
        means[fp8] = torch.tensor(losses).unflatten(0, (10, -1)).mean(1)
    assert not torch.equal(means["true"], means["false"])
    torch.testing.assert_close(means["true"], means["false"], rtol=0.01, atol=0)
    assert means["false"][-1] < 0.1 * means["false"][0]  # there was something to learn


def test_a_run_logs_to_wandb_and_goes_on_there(data, tmp_path, monkeypatch):
    """Offline, as on a node without the internet: the steps of both parts are in one run of W&B's."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir, settings = tmp_path / "run", {"train.wandb": "models"}
    run_until(trainer(data, run_dir, **settings), 8)
    trainer(data, run_dir, **settings).run()
    name = (run_dir / "wandb-id").read_text()
    files = sorted((run_dir / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert len(files) == 2
    assert [steps_of(path) for path in files] == [[4, 8], [8, 12]]  # from step 5 on again


def steps_of(path: Path) -> list[int]:
    """The steps whose losses a file of W&B holds: records with a header of 7 bytes each, the file's own before them."""
    from wandb.proto import wandb_internal_pb2

    content, at, steps = path.read_bytes(), 7, []
    assert len(content) < 32768  # one block: no record is cut
    while at < len(content):
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content[at + 7 : at + 7 + length])
        at += 7 + length
        values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "loss" in values:
            steps.append(values["step"])
    return steps


@pytest.mark.parametrize(
    ("setting", "package", "extra"),
    [
        ("train.fp8=true", "torchao", "fp8"),
        ("train.wandb=x", "wandb", "wandb"),
        ("eval.tasks.words={path: p, kind: caption}", "pycocoevalcap", "eval"),
    ],
)
def test_a_missing_package_is_an_error_that_names_the_extra(data, monkeypatch, setting, package, extra, tmp_path):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == package else importlib.util.find_spec(name))
    sources = f"--data.sources={{text: {{path: {data}/text}}}}"
    rows = ["--data.row_length=64", "--train.steps=2", f"--train.run_dir={tmp_path}", f"--{setting}"]
    reason = refusal(load(None, [sources, *rows]), 1)
    assert setting.partition("=")[0] in reason and package in reason and f"[{extra}]" in reason
    with pytest.raises(InputError, match=f"\\[{extra}\\]"):
        describe_run(load(None, [sources, *rows]))
