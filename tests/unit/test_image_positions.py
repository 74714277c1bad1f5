"""Positions of patches on a grid, and images that see only what came before: the rules against a walk along the row."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_factory import model_config, one_row
from run_factory import make_sources, trainer

from megamm.config import RopeScalingConfig
from megamm.estimate.tokens import stats_of_sources
from megamm.model.multimodal import MultimodalModel
from megamm.model.rotary import rotary_table
from megamm.sequence import causal_ends, grid_positions, keys_seen, pairs_of_documents, row_positions

GRID = (2, 4)


def document(images: int, words: list[int]) -> np.ndarray:
    """Spans: text, then images with text between and after."""
    spans = [1 + words[0]]
    for i in range(images):
        spans += [-GRID[0] * GRID[1], 1 + words[(i + 1) % len(words)]]
    return np.array(spans)


documents = st.builds(document, st.integers(0, 3), st.lists(st.integers(0, 4), min_size=1, max_size=4))


@given(st.lists(documents, max_size=4), st.integers(0, 5))
def test_the_rules_are_those_of_a_walk_along_the_row(layouts, padding):
    """Both need lo, hi and the position alone, so that a rank may hold any positions of a row."""
    length = sum(int(np.abs(layout).sum()) for layout in layouts) + padding
    start, is_image, lo, hi = row_positions(layouts, length)
    positions = np.arange(length) - start
    patch_index, grids = np.flatnonzero(is_image), [GRID] * sum(int((layout < 0).sum()) for layout in layouts)
    tensors = torch.from_numpy(positions), torch.from_numpy(patch_index), torch.tensor(grids).view(-1, 2)
    rows, columns = (one.numpy() for one in grid_positions(*tensors))
    ends = causal_ends(lo, hi, positions)
    patch = 0
    for q in range(length):
        patch = patch + 1 if is_image[q] and q and is_image[q - 1] else 0
        if is_image[q]:
            first = positions[q] - patch
            assert (rows[q], columns[q]) == (first + patch // GRID[1], first + patch % GRID[1])
        else:
            assert rows[q] == columns[q] == positions[q]
        assert ends[q] == (q if hi[q] >= lo[q] else hi[q])
    sizes = np.array([np.abs(layout).sum() for layout in layouts])
    patches = np.array([-layout[layout < 0].sum() for layout in layouts])
    image_pairs = np.array([(layout[layout < 0] ** 2).sum() for layout in layouts])
    for seen, is_causal in ((hi, False), (ends, True)):
        assert keys_seen(lo, seen).sum() == pairs_of_documents(sizes, patches, image_pairs, is_causal).sum()


def test_rows_and_columns_turn_every_other_pair():
    places, plain = torch.tensor([[5, 7]]), RopeScalingConfig()
    rows, columns = (rotary_table(torch.tensor([[p, p]]), 8, 100.0, plain) for p in (5, 7))
    cos, sin = rotary_table((places[:, [0, 0]], places[:, [1, 1]]), 8, 100.0, plain)
    for found, row, column in ((cos, rows[0], columns[0]), (sin, rows[1], columns[1])):
        torch.testing.assert_close(found[..., 0::2], row[..., 0::2])
        torch.testing.assert_close(found[..., 1::2], column[..., 1::2])


@pytest.mark.parametrize("architecture", ["early", "late"])
@pytest.mark.parametrize("settings", [{"image_mask": "causal"}, {"image_positions": "grid"}])
def test_the_settings_change_what_follows_an_image_and_nothing_in_text(architecture, settings):
    row = one_row([7, 8, 9, 10], torch.Generator().manual_seed(0))
    text = one_row([7, 8], torch.Generator().manual_seed(0))
    text.tokens[0, 1:5] = 11  # words where patches were
    text.hi[:] = text.positions
    for name in ("patches", "patch_index", "grids"):
        setattr(text, name, getattr(text, name)[:0])
    plain, other = (MultimodalModel(model_config(architecture, **s), seed=0).double() for s in ({}, settings))
    with torch.no_grad():
        assert torch.equal(plain.logits(text, torch.float64), other.logits(text, torch.float64))
        assert (plain.logits(row, torch.float64) - other.logits(row, torch.float64)).abs().max() > 1e-4


def test_pairs_of_attention_are_counted_as_they_are_seen(tmp_path):
    """By the trainer from rows, and by the estimator from lengths, up to the padding of rows."""
    data = make_sources(tmp_path)
    counts = {}
    for mask in ("bidirectional", "causal"):
        run = trainer(data, tmp_path / mask, **{"model.image_mask": mask, "train.steps": 4})
        run.run()
        stats = stats_of_sources(run.config)
        counts[mask] = run.totals["pairs"] / run.totals["tokens"], stats.pairs
    (seen, estimated), (fewer, estimated_fewer) = counts["bidirectional"], counts["causal"]
    assert fewer < seen and estimated_fewer < estimated
    assert estimated_fewer / estimated == pytest.approx(fewer / seen, rel=0.05)
