import hashlib
import pickle
from collections import Counter

import numpy as np
import pytest
from dataset_factory import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.data.pack_plan import SAVED_WINDOWS, PackPlan
from megamm.data.shards import ShardedDataset
from megamm.errors import InputError

ROW = 160


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    kinds = {"caption": 300, "interleaved": 90, "text": 40}
    return [
        ShardedDataset(make_dataset(folder / kind, kind=kind, num_documents=n, seed=i), "train")
        for i, (kind, n) in enumerate(kinds.items())
    ]


def make_plan(datasets, weights=(0.45, 0.45, 0.1), window_tokens=2000, seed=3, row_length=ROW, **options):
    return PackPlan(
        datasets[: len(weights)], weights, row_length=row_length, window_tokens=window_tokens, seed=seed, **options
    )


def row_of(plan, i):
    sources, documents = plan.row(i)
    return list(zip(sources.tolist(), documents.tolist(), strict=True))


def test_a_row_is_a_pure_function(datasets):
    forward = make_plan(datasets)
    rows = [row_of(forward, i) for i in range(200)]
    backward = make_plan(datasets)
    assert [row_of(backward, i) for i in reversed(range(200))] == rows[::-1]
    assert row_of(make_plan(datasets), 137) == rows[137]
    assert row_of(pickle.loads(pickle.dumps(forward)), 137) == rows[137]
    assert row_of(make_plan(datasets, seed=4), 137) != rows[137]


def test_rows_are_those_of_earlier_versions(datasets):
    """A run that goes on with a newer version must see the rows that it would have seen."""
    digest = hashlib.sha256()
    plan = make_plan(datasets)
    for i in (*range(300), 5000):
        sources, documents = plan.row(i)
        digest.update(sources.astype("u1").tobytes() + documents.astype("<i8").tobytes())
    assert digest.hexdigest() == "c2f37fc656b6fc436680fa0d65a3c8d6fc3f39857c6e8522906b67bcae1f88f8"


def test_rows_are_full_but_not_overfull(datasets):
    plan = make_plan(datasets, window_tokens=20_000)
    lengths = [sum(datasets[s].lengths[d].sum() for s, d in row_of(plan, i)) for i in range(500)]
    assert max(lengths) <= ROW
    assert np.mean(lengths) > 0.97 * ROW


@pytest.mark.parametrize("window_tokens", [100, 2000, 50_000, 1_000_000])
def test_each_document_once_per_epoch(datasets, window_tokens):
    """The stream of windows holds every document of a source e or e + 1 times, whatever the window."""
    plan = make_plan(datasets, window_tokens=window_tokens)
    assert plan.window_tokens <= max(window_tokens, 128 * ROW)
    seen = [Counter(), Counter(), Counter()]
    w = 0
    while not all(len(c) == len(d) for c, d in zip(seen, datasets, strict=True)):
        window = plan.window(w)
        for s, document in zip(window.sources.tolist(), window.documents.tolist(), strict=True):
            seen[s][document] += 1
        assert all(max(c.values(), default=0) - min(c.values(), default=0) <= 1 for c in seen if len(c))
        w += 1
        for c, d in zip(seen, datasets, strict=True):
            times = [c[i] for i in range(len(d))]
            assert max(times) - min(times) <= 1
            assert sum(times) == int(w * plan._rates[seen.index(c)])


def test_epochs_differ_in_order(datasets):
    plan = make_plan(datasets, weights=(1.0,))
    n = len(datasets[0])
    stream = np.concatenate([plan._draw(0, w) for w in range(10)])
    first, second = stream[:n], stream[n : 2 * n]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(n))
    assert np.mean(first == second) < 0.1


@settings(max_examples=10, deadline=None)
@given(
    weights=st.tuples(*[st.floats(0.05, 10)] * 3), window_tokens=st.integers(2000, 30_000), seed=st.integers(0, 2**63)
)
def test_shares_of_tokens(datasets, weights, window_tokens, seed):
    plan = make_plan(datasets, weights, window_tokens, seed)
    tokens = np.zeros(3)
    w = 0
    while tokens.sum() < 200_000:
        window = plan.window(w)
        for s, dataset in enumerate(datasets):
            tokens[s] += dataset.lengths[window.documents[window.sources == s]].sum()
        w += 1
    assert tokens / tokens.sum() == pytest.approx(np.array(weights) / sum(weights), abs=0.01)


def test_index_is_kept_and_extended(datasets, tmp_path):
    plan = make_plan(datasets, cache_dir=tmp_path)
    covered = []
    plan.ensure(50, covered.append)
    assert covered == sorted(covered) and covered[-1] == plan.num_rows_known >= 50
    (file,) = tmp_path.iterdir()
    again = make_plan(datasets, cache_dir=tmp_path)
    assert again.num_rows_known == plan.num_rows_known
    again.ensure(400)
    assert list(tmp_path.iterdir()) == [file]
    assert make_plan(datasets, cache_dir=tmp_path).num_rows_known == again.num_rows_known >= 400
    fresh = make_plan(datasets)
    assert [row_of(again, i) for i in (0, 49, 399, 900)] == [row_of(fresh, i) for i in (0, 49, 399, 900)]


def test_index_grows_as_rows_are_read(datasets, tmp_path):
    """Nothing beyond the first window is packed before it is needed, and what is packed once is kept."""
    plan = make_plan(datasets, cache_dir=tmp_path)
    plan.ensure(1)
    assert len(plan._ends) == 1
    for i in range(0, 3000, 8):
        plan.row(i)
    stored = make_plan(datasets, cache_dir=tmp_path)
    assert 0 < len(plan._ends) - len(stored._ends) < SAVED_WINDOWS
    assert np.array_equal(stored._ends, plan._ends[: len(stored._ends)])


def test_a_process_takes_over_what_another_has_counted(datasets, tmp_path, monkeypatch):
    reader, writer = (make_plan(datasets, cache_dir=tmp_path, saves=saves) for saves in (False, True))
    reader.row(2000)
    assert not list(tmp_path.iterdir())
    writer.ensure(6000)
    monkeypatch.setattr(reader, "_count_rows", None)
    reader.row(6000 - 1)
    assert np.array_equal(reader._ends, writer._ends)
    # A shorter index in memory never takes the place of a longer one on disk.
    late = make_plan(datasets, cache_dir=tmp_path)
    late._ends = late._ends[:3]
    late.row(1000)
    assert len(make_plan(datasets, cache_dir=tmp_path)._ends) == len(writer._ends)


def test_index_of_another_run(datasets, tmp_path):
    trunk = make_plan(datasets, cache_dir=tmp_path / "trunk")
    trunk.ensure(300)
    branch = make_plan(datasets, cache_dir=tmp_path / "branch", other_dirs=[tmp_path / "none", tmp_path / "trunk"])
    assert np.array_equal(branch._ends, trunk._ends)
    branch.ensure(600)
    assert len(make_plan(datasets, cache_dir=tmp_path / "trunk")._ends) == len(trunk._ends)


def test_a_full_disk_does_not_end_a_run(datasets, tmp_path):
    plan = make_plan(datasets, cache_dir=tmp_path / "file")
    (tmp_path / "file").write_text("in the way")
    assert row_of(plan, 2500) == row_of(make_plan(datasets), 2500)


def test_several_processes_count_the_same_rows(datasets):
    serial, parallel = make_plan(datasets), make_plan(datasets)
    serial.ensure(5000)
    assert len(serial._ends) > 256
    parallel.ensure(5000, processes=2)
    assert np.array_equal(serial._ends, parallel._ends)


def test_index_belongs_to_one_plan(datasets, tmp_path):
    make_plan(datasets, cache_dir=tmp_path).ensure(50)
    for other in ({"seed": 4}, {"window_tokens": 3000}, {"weights": (0.4, 0.5, 0.1)}, {"row_length": 200}):
        assert make_plan(datasets, **{"cache_dir": tmp_path} | other).num_rows_known == 0
    assert make_plan(datasets, cache_dir=tmp_path, weights=(45, 45, 10)).num_rows_known >= 50


@pytest.mark.parametrize("damage", ["cut", "empty", "flip 3", "flip 40"])
def test_a_damaged_index_is_made_again(datasets, tmp_path, damage):
    plan = make_plan(datasets, cache_dir=tmp_path)
    plan.ensure(50)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    if damage.startswith("flip"):
        data[int(damage.split()[1])] ^= 1
    file.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(damage)])
    again = make_plan(datasets, cache_dir=tmp_path)
    assert again.num_rows_known == 0
    again.ensure(50)
    assert make_plan(datasets, cache_dir=tmp_path).num_rows_known == plan.num_rows_known


def test_far_windows_do_not_drift(datasets):
    """After 10^12 windows the slices still join without gap or overlap, and the shares still hold."""
    plan = make_plan(datasets, (1 / 3, 1.1, 0.7))
    for w in (10**6, 10**12):
        counts = np.bincount(plan.window(w).sources, minlength=3)
        near = np.bincount(plan.window(0).sources, minlength=3)
        assert np.abs(counts - near).max() <= 1


def test_too_long_a_document(datasets):
    with pytest.raises(InputError, match=r"interleaved: document 'train-\d+' .* --max-length 60 .*row_length"):
        make_plan(datasets, row_length=60)


def test_an_empty_split(tmp_path):
    make_dataset(tmp_path / "few", num_documents=5, num_val=0)
    with pytest.raises(InputError, match="val split has no documents"):
        PackPlan([ShardedDataset(tmp_path / "few", "val")], [1.0], row_length=ROW, window_tokens=1000, seed=0)


def test_one_document(tmp_path):
    dataset = ShardedDataset(make_dataset(tmp_path / "one", num_documents=1), "train")
    plan = PackPlan([dataset], [1.0], row_length=ROW, window_tokens=1000, seed=0)
    assert all(set(row_of(plan, i)) == {(0, 0)} for i in range(20))
