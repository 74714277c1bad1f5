"""Losses of short runs, recorded once: what must not change when code is moved or spread."""

import json
from pathlib import Path

import pytest
import torch
from dataset_factory import make_dataset

from megamm.config import load
from megamm.trainer import Trainer

GOLDEN = json.loads((Path(__file__).parent / "golden_losses.json").read_text())


def losses_of(architecture: str, data: Path, run_dir: Path) -> dict[str, float]:
    """Training losses, gradient norm and validation losses of twelve steps of a tiny model."""
    settings = {
        "model.architecture": architecture,
        "model.width": 32,
        "model.depth": 2,
        "model.head_dim": 8,
        "model.hidden_multiple": 16,
        "data.row_length": 128,
        "data.window_tokens": 4000,
        "data.workers": 0,
        "data.sources": json.dumps({kind: {"path": f"{data}/{kind}"} for kind in ("caption", "interleaved", "text")}),
        "optimizer.lr": 0.003,
        "optimizer.vision_lr_factor": 0.5,
        "schedule.warmup_steps": 3,
        "train.steps": 12,
        "train.batch_rows": 4,
        "train.micro_rows": 2,
        "train.log_every": 4,
        "train.device": "cpu",
        "train.run_dir": run_dir,
        "eval.rows": 4,
        "eval.swap_images": True,
        "checkpoint.every": 0,
        "checkpoint.final": False,
    }
    result = Trainer(load(None, [f"--{key}={value}" for key, value in settings.items()])).run()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {f"step {r['step']}": r["loss"] for r in lines if "loss" in r}
    found |= {f"gradient norm {r['step']}": r["grad_norm"] for r in lines if "grad_norm" in r}
    found |= {f"validation {s}": v["loss"] for s, v in result["losses"].items()}
    return found | {f"swapped {s}": v["loss"] for s, v in result["losses_swapped"].items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    for seed, kind in enumerate(("caption", "interleaved", "text")):
        make_dataset(folder / kind, kind=kind, num_documents=120, seed=seed)
    return folder


@pytest.mark.parametrize("architecture", ["early", "late", "text"])
def test_losses_are_the_recorded_ones(architecture, data, tmp_path):
    torch.use_deterministic_algorithms(False)
    found = losses_of(architecture, data, tmp_path / "run")
    assert found == pytest.approx(GOLDEN[architecture], rel=2e-5)
