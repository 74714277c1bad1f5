"""A run goes on in layouts unlike the one that wrote its checkpoint, with the losses of one process."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from test_data_parallel import losses, write_config

CONSTANT = ("--schedule.cooldown=none", "--schedule.warmup_steps=3")  # so that more steps are the same run
EXPERTS = ("--model.experts.num=4", "--model.experts.top_k=2", "--model.experts.hidden=16")
ROADS = {
    "dense": ((), ["tensor=2 pipeline=2", "dp_shard=4", "", "context=2 tensor=2"]),
    "experts": (EXPERTS, ["expert=2 dp_shard=2 tensor=2", "", "pipeline=2 dp_shard=2"]),
    "muon": (("--optimizer.name=muon",), ["tensor=2 dp_shard=2", "pipeline=2", "dp_replicate=2 tensor=2"]),
}


def train(run_dir: Path, config: Path, *overrides: str) -> None:
    """One rank of a run: on forked ranks, because torchrun's fresh interpreters take longer to start than to train."""
    from megamm.config import load
    from megamm.resolve import resolve_config
    from megamm.trainer import Trainer

    Trainer(resolve_config(load(config, [f"--train.run_dir={run_dir}", *overrides]))).run()


@pytest.mark.parametrize("road", ROADS)
def test_a_run_goes_on_in_any_layout(tmp_path, road):
    """Tensor and pipeline ranks, then sharded data, then one process, and back: losses within 1e-5."""
    settings, layouts = ROADS[road]
    config = write_config(tmp_path, "early")
    whole, run = tmp_path / "whole", tmp_path / "run"
    steps = 5 * len(layouts)
    run_ranks(train, 1, whole, config, *CONSTANT, *settings, f"--train.steps={steps}")
    for number, layout in enumerate(layouts):
        axes = layout.split()
        ranks = 4 if len(axes) > 1 or layout == "dp_shard=4" else 2 if axes else 1
        flags = [f"--parallel.{axis}" for axis in axes]
        run_ranks(train, ranks, run, config, *CONSTANT, *settings, *flags, f"--train.steps={5 * (number + 1)}")
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, run)]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
    assert results[1]["tokens"] == results[0]["tokens"]
