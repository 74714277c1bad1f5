"""Training killed with -9 ten times ends with the losses of an undisturbed run, bit for bit."""

import json
import random
import sys

import pytest
import yaml
from dataset_factory import make_dataset
from killing import outcome, run, run_killed

STEPS = 150


@pytest.mark.slow
def test_training_killed_at_random_moments_ends_the_same(tmp_path):
    for name, kind in (("pairs", "caption"), ("pages", "interleaved")):
        make_dataset(tmp_path / name, kind=kind, num_documents=200)
    config = {
        "model": {"width": 32, "depth": 2, "head_dim": 16, "hidden_multiple": 16},
        "data": {
            "sources": {name: {"path": str(tmp_path / name)} for name in ("pairs", "pages")},
            "row_length": 160,
            "window_tokens": 2000,
        },
        "schedule": {"warmup_steps": 10},
        "train": {"steps": STEPS, "batch_rows": 4, "log_every": 3},
        "eval": {"every": 50, "rows": 8, "swap_images": True},
        "checkpoint": {"every": 7, "keep": 1},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    log = tmp_path / "log.txt"

    def command(folder: str) -> list:
        return [sys.executable, "-m", "megamm.train", "--config", file, "--train.run_dir", tmp_path / folder]

    seconds = run(command("undisturbed"), log)
    ended, starts = run_killed(lambda n: command(f"killed-{n}"), random.Random(1), 10, seconds, log)
    assert starts == 10 + len(ended)
    expected = outcome(tmp_path / "undisturbed")
    assert [r["step"] for r in expected[1] if "loss" in r] == list(range(3, STEPS + 1, 3))
    for attempt in ended:
        folder = tmp_path / f"killed-{attempt}"
        result, records = outcome(folder)
        result["name"] = expected[0]["name"]
        assert (result, records) == expected
        assert [p.name for p in (folder / "checkpoints").glob("step-*")] == [f"step-{STEPS:08d}"]
        assert not list(folder.glob("**/.*.tmp")), "a half-written file is left"
    assert json.loads((tmp_path / "undisturbed" / "result.json").read_text())["steps"] == STEPS
