"""torchrun's two ranks give the losses of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_factory import make_dataset

SETTINGS = """
model: {architecture: %s, width: 32, depth: 2, head_dim: 16, hidden_multiple: 16}
data: {row_length: 48, window_tokens: 4000, workers: 0, sources: {caption: {path: %s/caption}, text: {path: %s/text}}}
optimizer: {lr: 0.003, vision_lr_factor: 0.5}
schedule: {warmup_steps: 5, cooldown: linear}
train: {steps: 20, batch_rows: 8, log_every: 1, device: cpu, run_dir: %s}
eval: {rows: 4}
checkpoint: {every: 10}
"""


def write_config(folder: Path, architecture: str) -> Path:
    """Data of short rows: some have no image, so that ranks differ in whether they see one."""
    for kind in ("caption", "text"):
        make_dataset(folder / kind, kind=kind, num_documents=200, seed=0)
    config = folder / "run.yaml"
    config.write_text(SETTINGS % (architecture, folder, folder, folder / "unused"))
    return config


def train(run_dir: Path, config: Path, ranks: int, *overrides: str) -> subprocess.CompletedProcess:
    command = ["-m", "megamm.train", "--config", str(config), f"--train.run_dir={run_dir}", *overrides]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if "loss" in r]


def test_two_ranks_equal_one(tmp_path):
    config = write_config(tmp_path, "late")
    for name, ranks, extra in (("one", 1, ()), ("two", 2, ("--train.micro_rows=1",))):
        done = train(tmp_path / name, config, ranks, *extra)
        assert done.returncode == 0, done.stderr
    one = losses(tmp_path / "one")
    assert len(one) == 20 and one[-1] < one[0]
    assert losses(tmp_path / "two") == pytest.approx(one, rel=1e-5)
    final = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two")]
    assert final[1]["loss"] == pytest.approx(final[0]["loss"], rel=1e-5)
    assert final[1]["tokens"] == final[0]["tokens"]
