import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.data.packing import best_fit_decreasing, fill_exactly, num_rows, pack_documents, padding_share
from megamm.data.permutation import derive_seed, hash64, permute

ROW = 64
LENGTHS = st.lists(st.integers(1, ROW), max_size=200).map(lambda x: np.array(x, np.int64))


def textbook_best_fit(lengths: np.ndarray, row_length: int) -> int:
    """Rows of best-fit-decreasing, as its definition reads."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(row_length)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=rooms.__getitem__)] -= length
    return len(rooms)


@pytest.mark.parametrize("pack", [pack_documents, best_fit_decreasing, fill_exactly])
@given(lengths=LENGTHS)
def test_rows_are_not_overfull_nor_empty(pack, lengths):
    rows = pack(lengths, ROW)
    assert np.array_equal(rows, pack(lengths, ROW))
    assert rows.shape == lengths.shape
    filled = np.bincount(rows, weights=lengths, minlength=1)
    assert (filled <= ROW).all()
    if len(lengths):
        assert (filled > 0).all()


@given(LENGTHS)
def test_few_rows(lengths):
    ours, best_fit = num_rows(pack_documents(lengths, ROW)), num_rows(best_fit_decreasing(lengths, ROW))
    assert -(-int(lengths.sum()) // ROW) <= ours <= best_fit == textbook_best_fit(lengths, ROW)
    filled = np.sort(np.bincount(pack_documents(lengths, ROW), weights=lengths, minlength=2))
    assert filled[0] == 0 or filled[0] + filled[1] > ROW  # no two rows fit into one


@given(LENGTHS.filter(len), st.integers(0, 10))
def test_each_row_is_filled_as_well_as_possible(lengths, pick):
    """No subset of the documents of later rows fills a row better, next to its longest document."""
    rows = fill_exactly(lengths, ROW)
    row = pick % (rows.max() + 1)
    first = lengths[rows >= row].max()
    assert first == lengths[rows == row].max()
    others = sorted(lengths[rows >= row].tolist())
    others.remove(first)
    sums = {0}
    for length in others:
        sums |= {s + length for s in sums if s + length <= ROW - first}
    assert lengths[rows == row].sum() == first + max(sums)


@pytest.mark.parametrize("row_length", [1024, 4096])
@pytest.mark.parametrize("patches", [64, 256])
def test_padding_of_captions_and_pages(row_length, patches):
    rng = np.random.default_rng(0)
    captions = patches + 3 + rng.integers(20, 61, 1500)
    pages = rng.integers(300, row_length + 1, 1_000_000 // row_length)
    lengths = np.concatenate([captions, pages])
    ours = num_rows(pack_documents(lengths, row_length))
    assert ours <= num_rows(best_fit_decreasing(lengths, row_length))
    if patches == 64 or row_length == 4096:
        assert padding_share(lengths, ours, row_length) < (0.03 if row_length == 1024 else 0.01)


def test_exact_fill_has_no_padding():
    lengths = np.array([10, 54, 30, 34, 64, 1, 63])
    assert padding_share(lengths, num_rows(pack_documents(lengths, ROW)), ROW) == 0


@given(st.integers(1, 3000), st.integers(0, 2**70))
def test_permutation(n, seed):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed)), np.arange(n))


@given(st.integers(1, 10**12), st.integers(0, 2**64 - 1), st.data())
def test_permutation_has_random_access(n, seed, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)), np.int64)
    whole = permute(index, n, seed)
    assert ((whole >= 0) & (whole < n)).all()
    assert [int(permute(np.array([i]), n, seed)[0]) for i in index] == whole.tolist()


@pytest.mark.parametrize("n", [5, 16, 23])
def test_permutation_mixes(n):
    """Every (position, element) pair is as frequent as any other, and so is every pair of neighbours' elements."""
    seeds = 2000
    drawn = np.stack([permute(np.arange(n), n, seed) for seed in range(seeds)])
    pairs = np.zeros((n, n))
    np.add.at(pairs, (np.tile(np.arange(n), seeds), drawn.ravel()), 1)
    neighbours = np.zeros((n, n))
    np.add.at(neighbours, (drawn[:, 0], drawn[:, 1]), 1)
    for observed, cells, freedom in (
        (pairs.ravel(), n * n, (n - 1) ** 2),
        (neighbours[~np.eye(n, dtype=bool)], n * (n - 1), n * (n - 1) - 1),
    ):
        expected = observed.sum() / cells
        chi2 = ((observed - expected) ** 2 / expected).sum()
        assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


def test_hash_and_order_never_change():
    """The data order of past runs hangs on these values; the hashes are the published ones of splitmix64."""
    assert hash64(np.arange(3), 0).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert permute(np.arange(10), 10, 7).tolist() == [0, 2, 9, 3, 7, 6, 1, 8, 5, 4]
    assert len({derive_seed(1, 2), derive_seed(2, 1), derive_seed(1, 2, 0), derive_seed(1), derive_seed(0)}) == 5
