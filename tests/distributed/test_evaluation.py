"""Validation gives the same numbers whatever the ranks and micro-batches: same rows, same pairs of images."""

from pathlib import Path

import pytest
import torch
from dataset_factory import make_dataset
from ranks import run_ranks

from megamm.config import load
from megamm.trainer import Trainer

ROWS = 5  # shares of 2, 2 and 1 rows on 3 ranks; 3 and 2 on 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows hold an image and a caption or two; some rows of pages hold several images, of unlike shape."""
    folder = tmp_path_factory.mktemp("data")
    for kind, fit in (("caption", "pad"), ("interleaved", "native")):
        make_dataset(folder / kind, kind=kind, num_documents=60, num_val=20, max_text=12, fit=fit)
    return folder


def validate(data: Path, run_dir: Path, *overrides: str) -> dict:
    """Losses on true and on swapped images of a model as it was drawn."""
    settings = {
        "model": "{architecture: late, width: 16, depth: 1, head_dim: 8, hidden_multiple: 8}",
        "data.row_length": 96,
        "data.workers": 0,
        "data.sources": f"{{caption: {{path: {data}/caption}}, pages: {{path: {data}/interleaved}}}}",
        "train": f"{{steps: 1, batch_rows: 6, device: cpu, run_dir: {run_dir}}}",
        "eval.rows": ROWS,
    }
    run = Trainer(load(None, [*(f"--{key}={value}" for key, value in settings.items()), *overrides]))
    assert run.world.size == (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    return {"true": run.validate(), "swapped": run.validate(swapped=True)}


def spread(size: int, data: Path, run_dir: Path, *overrides: str) -> dict:
    """The losses of ``size`` processes, equal on all of them."""
    found = run_ranks(validate, size, data, run_dir, *overrides, timeout=600)
    assert all(losses == found[0] for losses in found)
    return found[0]


def flat(losses: dict) -> dict:
    return {(i, s, k): value for i, part in losses.items() for s, kinds in part.items() for k, value in kinds.items()}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> dict:
    return flat(validate(data, tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize("micro", [1, 2])
def test_the_size_of_micro_batches_changes_nothing(data, alone, tmp_path, micro):
    assert flat(validate(data, tmp_path, f"--train.micro_rows={micro}")) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(("ranks", "micro"), [(2, 3), (3, 2), (3, 1)])
def test_the_number_of_ranks_changes_nothing(data, alone, tmp_path, ranks, micro):
    losses = spread(ranks, data, tmp_path, f"--train.micro_rows={micro}")
    assert flat(losses) == pytest.approx(alone, rel=1e-6)


def test_stages_of_a_pipeline_see_the_same_rows(data, tmp_path):
    deeper = "--model.depth=2"
    expected = flat(validate(data, tmp_path / "alone", deeper))
    losses = spread(2, data, tmp_path, deeper, "--parallel.pipeline=2", "--parallel.micro_batches=6")
    assert flat(losses) == pytest.approx(expected, rel=1e-6)


def test_swapping_images_matters(alone):
    gaps = [
        alone["swapped", s, "text_after_image"] - alone["true", s, "text_after_image"] for s in ("caption", "pages")
    ]
    assert all(abs(gap) > 1e-5 for gap in gaps)


def test_image_i_gets_the_pixels_of_image_i_minus_1(data, tmp_path):
    """Across micro-batches of one row, of which some may have no image; stretched where the shape is another."""
    run = Trainer(
        load(
            None,
            [
                f"--data={{row_length: 96, workers: 0, sources: {{pages: {{path: {data}/interleaved}}}}}}",
                "--model={width: 16, depth: 1, head_dim: 8, hidden_multiple: 8}",
                f"--train={{steps: 1, batch_rows: 1, device: cpu, run_dir: {tmp_path}}}",
                f"--eval.rows={ROWS}",
            ],
        )
    )
    rows = run.plan_validation()["pages"]
    true, swapped = (
        [batch for batches in rows.passes(run.world, swapped) for batch in batches] for swapped in (False, True)
    )
    grids = torch.cat([batch.grids for batch in true])
    sizes = grids.prod(1).tolist()
    pixels, moved = (torch.cat([b.patches for b in batches]).split(sizes) for batches in (true, swapped))
    assert len(pixels) > ROWS
    same = (grids == grids.roll(1, 0)).all(1).tolist()
    assert True in same and False in same
    for before, found, equal in zip((pixels[-1], *pixels), moved, same, strict=False):
        # Pictures are of one colour each, up to some noise.
        colours = (x.float().unflatten(1, (-1, 3)).mean((0, 1)) for x in (before, found))
        assert torch.equal(found, before) if equal else torch.allclose(*colours, atol=8)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(true, swapped, strict=True))
