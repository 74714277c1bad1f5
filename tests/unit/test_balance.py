"""Dealing rows by work: equal numbers, every row once, little spread, and a function of the costs alone."""

from pathlib import Path

import numpy as np
import pytest
from dataset_factory import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.config import load
from megamm.data.balance import deal_rows, row_contents, row_costs, spread
from megamm.data.loader import build_pack_plan, open_sources
from megamm.data.rows import RowReader
from megamm.model.counts import TokenStats, exact_flops_per_token, flops_weights
from megamm.resolve import resolve_config
from megamm.sequence import keys_seen


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e12]))
def test_every_row_once_and_never_worse_than_in_order(ranks, room, seed, scale):
    costs = scale * np.random.default_rng(seed).pareto(2, ranks * room)
    dealt = deal_rows(costs, ranks)
    assert dealt.shape == (ranks, room) and sorted(dealt.ravel()) == list(range(ranks * room))
    assert (np.diff(dealt, axis=1) > 0).all()
    np.testing.assert_array_equal(dealt, deal_rows(costs.copy(), ranks))
    assert costs[dealt].sum(1).max() <= costs.reshape(ranks, room).sum(1).max() * (1 + 1e-9)


def test_exchanges_beat_dealing_alone():
    """The largest first alone gives 12 and 10."""
    costs = np.array([6.0, 5.0, 5.0, 0.0, 3.0, 3.0])
    assert costs[deal_rows(costs, 2)].sum(1).tolist() == [11, 11]


@pytest.mark.parametrize("ranks", [8, 64])
def test_spread_of_skewed_rows(ranks):
    rng = np.random.default_rng(0)
    costs = 1 + rng.beta(0.5, 2, 2048)
    assert spread(costs, np.arange(2048).reshape(ranks, -1)) > 0.02
    assert spread(costs, deal_rows(costs, ranks)) < 1e-3


def test_equal_and_absent_costs():
    assert deal_rows(np.zeros(6), 3).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert deal_rows(np.zeros(0), 3).shape == (3, 0)
    for ranks in (0, 4):
        with pytest.raises(ValueError, match=f"6 rows cannot be dealt to {ranks} ranks"):
            deal_rows(np.ones(6), ranks)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "pages", kind="interleaved", num_documents=200)


def test_contents_from_lengths_against_rows_read(prepared):
    config = resolve_config(
        load(None, [f"--data.sources.pages.path={prepared}", "--data.row_length=256", "--train.steps=1"])
    )
    datasets = open_sources(config.data, "train")
    plan = build_pack_plan(datasets, [1.0], config.data, num_rows=16)
    contents = row_contents(plan, range(4, 12))
    batch = RowReader(plan, datasets, config.data.augment, config.data.seed).read(range(4, 12))
    np.testing.assert_array_equal(contents.labels, (batch.targets >= 0).sum(1))
    np.testing.assert_array_equal(contents.pairs, keys_seen(batch.lo, batch.hi).sum(1))
    np.testing.assert_array_equal(contents.patches, np.bincount(batch.patch_index // 256, minlength=8))
    costs = row_costs(contents, 256, **flops_weights(config.model)._asdict())
    total = TokenStats(**{name: values.sum() / (8 * 256) for name, values in contents._asdict().items()})
    assert costs.sum() == pytest.approx(8 * 256 * exact_flops_per_token(config.model, total))
