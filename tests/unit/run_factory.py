"""Tiny runs for tests: two sources, a model that trains in a second."""

import os
from pathlib import Path

from dataset_factory import make_dataset

from megamm.config import load
from megamm.trainer import Trainer


def make_sources(folder: Path, **options) -> Path:
    """Prepared data ``caption`` and ``text`` in a folder, which is returned."""
    for seed, kind in enumerate(("caption", "text")):
        make_dataset(folder / kind, kind=kind, num_documents=120, seed=seed, **options)
    return folder


def trainer(data: Path, run_dir: Path, **overrides) -> Trainer:
    """A run of 12 steps on :func:`make_sources`; ``overrides`` by dotted name."""
    settings = {
        "model.width": 16,
        "model.depth": 1,
        "model.head_dim": 8,
        "model.hidden_multiple": 8,
        "data.row_length": 64,
        "data.window_tokens": 2000,
        "data.workers": 0,
        "data.sources": f"{{caption: {{path: {data}/caption}}, text: {{path: {data}/text}}}}",
        "optimizer.lr": 0.003,
        "schedule.warmup_steps": 3,
        "train.steps": 12,
        "train.batch_rows": 8,
        "train.log_every": 4,
        "train.device": "cpu",
        "train.run_dir": run_dir,
        "train.peak_flops": 1e12,
        "eval.rows": 4,
        "checkpoint.every": 5,
    } | overrides
    return Trainer(load(None, [f"--{key}={value}" for key, value in settings.items()]))


class Killed(BaseException):
    """Stands for kill -9: nothing in the code catches it."""


def run_until(run: Trainer, step: int) -> None:
    """Train and end before ``step``, as if killed there; what was being saved is saved."""
    train_step = run.train_step

    def stop(batches):
        if run.step == step:
            raise Killed
        return train_step(batches)

    run.train_step = stop
    try:
        run.run()
    except Killed:
        return
    raise AssertionError(f"the run ended before step {step}")


def flip_bit(path: Path, where: int | None = None) -> None:
    """Change one bit of a file, in its middle by default, in place."""
    with path.open("r+b") as file:
        file.seek(os.path.getsize(path) // 2 if where is None else where)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
