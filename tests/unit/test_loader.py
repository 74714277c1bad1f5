import json
import multiprocessing
import os
import signal
import time
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
import torch
from dataset_factory import make_dataset
from hypothesis import given
from hypothesis import strategies as st

from megamm.config import AugmentConfig, DataConfig, SourceConfig
from megamm.data import images
from megamm.data import loader as loader_module
from megamm.data.loader import Loader, build_pack_plan, open_sources
from megamm.data.rows import FIELDS, fill_row
from megamm.data.shards import SCHEMA, Example, document_digest
from megamm.errors import InputError, RunError
from megamm.sequence import IGNORE, IMAGE, PAD, Batch

ROW = 160
BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for kind in ("caption", "interleaved", "text"):
        make_dataset(folder / kind, kind=kind, num_documents=100, seed=1)
    return folder


def data_config(folder, kinds=("caption", "interleaved", "text"), **changes) -> DataConfig:
    sources = {kind: SourceConfig(path=str(folder / kind), weight=1.0) for kind in kinds}
    return DataConfig(sources=sources, row_length=ROW, window_tokens=3000, seed=5, **{"workers": 0} | changes)


def make_loader(config, *, split="train", start=0, end=4, batch=BATCH, **changes) -> Loader:
    datasets = open_sources(config, split)
    plan = build_pack_plan(datasets, [s.weight for s in config.sources.values()], config)
    return Loader(plan, datasets, config, global_batch_rows=batch, start_step=start, end_step=end, **changes)


def load(config, **changes) -> list[list[Batch]]:
    return list(make_loader(config, **changes))


def join(batches: list[Batch]) -> Batch:
    """One batch of all rows."""
    joined = {f.name: torch.cat([getattr(b, f.name) for b in batches]) for f in fields(Batch)}
    starts = np.cumsum([0] + [b.tokens.numel() for b in batches])
    for name in ("patch_index", "label_index"):
        joined[name] = torch.cat([getattr(b, name) + int(s) for b, s in zip(batches, starts, strict=False)])
    return Batch(**joined)


def same(a: Batch, b: Batch) -> bool:
    return all(
        getattr(a, f.name).dtype == getattr(b, f.name).dtype and torch.equal(getattr(a, f.name), getattr(b, f.name))
        for f in fields(Batch)
    )


# ---- one row ------------------------------------------------------------------------------------------


@st.composite
def documents(draw):
    """Documents of text spans (never two in a row) and images."""
    examples = []
    for i in range(draw(st.integers(1, 5))):
        spans = draw(st.lists(st.integers(-5, 5).filter(bool), min_size=1, max_size=5))
        joined = [spans[0]]
        for n in spans[1:]:
            if n > 0 and joined[-1] > 0:
                joined[-1] += n
            else:
                joined.append(n)
        tokens = np.array(
            draw(st.lists(st.integers(5, 99), min_size=(n := sum(x for x in joined if x > 0)), max_size=n))
        )
        examples.append(
            Example(id=str(i), tokens=tokens.astype(np.int32), layout=np.array(joined, np.int32), images=[])
        )
    return examples


def reference_row(examples: list[Example], sources: list[int], length: int) -> dict[str, list[int]]:
    """Position by position, from the documents alone."""
    row = {name: [] for name in FIELDS} | {"is_image": []}
    for example, source in zip(examples, sources, strict=True):
        start, words = len(row["tokens"]), iter(example.tokens.tolist())
        kinds = [(n < 0, k, abs(n)) for n in example.layout.tolist() for k in range(abs(n))]
        tokens = [IMAGE if image else next(words) for image, _, _ in kinds]
        for p, (image, k, n) in enumerate(kinds):
            labelled = p + 1 < len(kinds) and not image and not kinds[p + 1][0]
            after = any(other for other, _, _ in kinds[: p + 1])
            row["tokens"].append(tokens[p])
            row["positions"].append(p)
            row["targets"].append(tokens[p + 1] if labelled else IGNORE)
            row["source"].append(source)
            row["label_kind"].append(int(labelled and after))
            row["lo"].append(start)
            row["hi"].append(start + p + (n - 1 - k if image else 0))
            row["is_image"].append(image)
    for q in range(len(row["tokens"]), length):
        padding = {"tokens": PAD, "targets": IGNORE, "lo": q, "hi": q - 1}
        for name in row:
            row[name].append(padding.get(name, 0))
    return row


@given(documents(), st.integers(0, 9), st.randoms(use_true_random=False))
def test_row_against_brute_force(examples, padding, random):
    sources = [random.randrange(4) for _ in examples]
    length = sum(int(np.abs(e.layout).sum()) for e in examples) + padding
    row = {name: np.full(length, value, dtype) for name, (dtype, value) in FIELDS.items()}
    is_image = fill_row(row, examples, np.array(sources, np.uint8))
    expected = reference_row(examples, sources, length)
    assert is_image.tolist() == [bool(x) for x in expected.pop("is_image")]
    assert {name: a.tolist() for name, a in row.items()} == expected
    for name in ("lo", "hi"):
        assert (np.diff(row[name]) >= 0).all()
    # The interval of a query is the set of keys that causal attention over text and full attention inside an
    # image give it.
    spans = [(d, k, n) for d, e in enumerate(examples) for k, n in enumerate(e.layout.tolist()) for _ in range(abs(n))]
    for q, (d, k, n) in enumerate(spans):
        keys = {j for j, (e, m, _) in enumerate(spans) if e == d and (j <= q or (n < 0 and m == k))}
        assert keys == set(range(row["lo"][q], row["hi"][q] + 1))


# ---- batches ------------------------------------------------------------------------------------------


def test_batch_fields(folder):
    (batch,) = load(data_config(folder))[0]
    shapes = dict.fromkeys(FIELDS, (BATCH, ROW))
    shapes |= {"patches": (batch.patch_index.numel(), 8 * 8 * 3), "patch_index": (batch.patches.shape[0],)}
    shapes |= {"grids": (batch.patch_index.numel() // 4, 2)}
    shapes |= {"label_index": (int((batch.targets >= 0).sum()),)}
    dtypes = dict.fromkeys(("tokens", "positions", "targets", "lo", "hi", "grids"), torch.int32)
    dtypes |= dict.fromkeys(("source", "label_kind", "patches"), torch.uint8)
    dtypes |= dict.fromkeys(("patch_index", "label_index"), torch.int64)
    for f in fields(Batch):
        assert tuple(getattr(batch, f.name).shape) == shapes[f.name]
        assert getattr(batch, f.name).dtype == dtypes[f.name]
    assert torch.equal((batch.tokens.flatten() == IMAGE).nonzero().flatten(), batch.patch_index)
    assert torch.equal((batch.targets.flatten() >= 0).nonzero().flatten(), batch.label_index)
    assert set(batch.source.unique().tolist()) == {0, 1, 2}
    assert (batch.source[batch.label_kind == 1] < 2).all()
    assert (batch.targets[batch.tokens == PAD] == IGNORE).all()


def test_patches_are_those_of_the_documents(folder):
    config = data_config(folder, kinds=("interleaved",))
    loader = make_loader(config)
    (dataset,) = open_sources(config, "train")
    plan = build_pack_plan([dataset], [1.0], config)
    expected = [
        images.patchify(images.decode(data), 8)
        for i in range(BATCH, 2 * BATCH)
        for document in plan.row(i)[1]
        for data in dataset[int(document)].images
    ]
    batch = list(loader)[1][0]
    assert np.array_equal(batch.patches.numpy(), np.concatenate(expected))


def test_every_label_is_counted_once(folder):
    """A window holds the labels of each of its documents exactly once."""
    config = data_config(folder, kinds=("caption",))
    (dataset,) = open_sources(config, "train")
    plan = build_pack_plan([dataset], [1.0], config)
    rows = plan.window(0).num_rows
    ((batch,),) = Loader(plan, [dataset], config, global_batch_rows=rows, end_step=1)
    text, patches = dataset.lengths[plan.window(0).documents].sum(0)
    documents = len(plan.window(0).documents)
    assert documents >= len(dataset)
    assert batch.num_labels() == text - 2 * documents  # neither <bos> before an image nor <eos> has a label
    assert batch.patches.shape[0] == patches


@pytest.mark.parametrize("workers", [1, 2])
def test_order_does_not_depend_on_workers(folder, workers):
    augment = AugmentConfig(crop_scale_min=0.4, flip=True)
    alone = load(data_config(folder, augment=augment))
    others = load(data_config(folder, augment=augment, workers=workers, prefetch=2))
    assert len(alone) == len(others) == 4
    assert all(same(a, b) for x, y in zip(alone, others, strict=True) for a, b in zip(x, y, strict=True))


def test_workers_may_be_spawned(folder, monkeypatch):
    """Nothing that a worker needs is lost in pickling."""
    monkeypatch.setattr(loader_module, "_context", lambda: "spawn")
    spawned = load(data_config(folder, workers=1), end=2)
    assert all(same(a[0], b[0]) for a, b in zip(spawned, load(data_config(folder), end=2), strict=True))


def test_order_does_not_depend_on_ranks_or_micro_batches(folder):
    config = data_config(folder)
    whole = load(config)
    parts = [load(config, rank=rank, num_ranks=4, micro_rows=1) for rank in range(4)]
    for k, (batch,) in enumerate(whole):
        assert [len(rank[k]) for rank in parts] == [2] * 4
        assert same(join([micro for rank in parts for micro in rank[k]]), batch)
    uneven = load(config, micro_rows=3)
    assert [b.tokens.shape[0] for b in uneven[0]] == [3, 3, 2]
    assert same(join(uneven[2]), whole[2][0])


def test_resuming_equals_going_on(folder):
    config = data_config(folder, augment=AugmentConfig(crop_scale_min=0.4, flip=True))
    whole = load(config, end=6)
    rest = load(config, start=4, end=6)
    assert all(same(a[0], b[0]) for a, b in zip(whole[4:], rest, strict=True))
    assert load(config, start=6, end=6) == []


def test_augmentation_changes_with_the_epoch_only(folder):
    plain = load(data_config(folder, kinds=("caption",)))[0][0]
    augmented = [load(data_config(folder, kinds=("caption",), augment=AugmentConfig(flip=True)))[0][0] for _ in "ab"]
    assert same(*augmented)
    assert torch.equal(plain.tokens, augmented[0].tokens)
    assert not torch.equal(plain.patches, augmented[0].patches)


def test_waiting_is_measured(folder):
    loader = make_loader(data_config(folder))
    list(loader)
    assert loader.wait_seconds() > 0
    assert loader.wait_seconds() == 0


def test_val_split_of_one_source(folder):
    config = data_config(folder, kinds=("text",))
    ((batch,),) = load(config, split="val", end=1)
    assert batch.patches.shape == (0, 192) and batch.label_kind.max() == 0


# ---- bad input ----------------------------------------------------------------------------------------


def test_sources_must_agree(tmp_path):
    make_dataset(tmp_path / "caption", num_documents=3)
    make_dataset(tmp_path / "text", num_documents=3, tokenizer_sha256="1" * 64)
    with pytest.raises(InputError, match=r"caption has tokenizer_sha256 0+, .*text has 1+"):
        open_sources(data_config(tmp_path, kinds=("caption", "text")), "train")
    make_dataset(tmp_path / "text", num_documents=3, patch_size=4)
    with pytest.raises(InputError, match=r"caption has patch_size 8, .*text has 4"):
        open_sources(data_config(tmp_path, kinds=("caption", "text")), "train")


def test_batch_must_divide_among_ranks(folder):
    with pytest.raises(InputError, match=r"batch_rows: 8 .* 3 "):
        make_loader(data_config(folder), num_ranks=3)


def damage(folder, change) -> None:
    """Rewrite the first shard with ``change`` applied to its documents, as a faulty writer would."""
    file = folder / "caption" / "train" / "shard-00000.arrow"
    rows = pa.ipc.open_file(pa.BufferReader(file.read_bytes())).read_all().to_pylist()
    for row in rows:
        change(row)
        row["digest"] = document_digest(row["id"], row["tokens"], row["layout"], row["images"])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    info = json.loads((folder / "caption" / "dataset.json").read_text())
    info["splits"]["train"]["shards"][0]["num_bytes"] = file.stat().st_size
    (folder / "caption" / "dataset.json").write_text(json.dumps(info))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: row.update(images=[row["images"][0][:60]]), "image 0: "),
        (lambda row: row.update(images=[images.encode(np.zeros((8, 8, 3), np.uint8))]), "image 0: has 1 patches"),
        (lambda row: row.update(images=[]), "does not fit its images"),
        (lambda row: row["tokens"].pop(), "length"),
        (lambda row: row["layout"].append(3), "does not fit its tokens"),
        (lambda row: row["tokens"].__setitem__(3, 300), "vocabulary"),
    ],
)
def test_a_damaged_document_is_named(tmp_path, change, reason, workers):
    make_dataset(tmp_path / "caption", num_documents=10)
    damage(tmp_path, change)
    with pytest.raises(RunError, match=rf"caption: document 'train-\d+' .*{reason}.*prepare") as caught:
        load(data_config(tmp_path, kinds=("caption",), workers=workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_shard_is_named(tmp_path, workers):
    make_dataset(tmp_path / "caption", num_documents=10)
    file = tmp_path / "caption" / "train" / "shard-00000.arrow"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"shard-00000\.arrow: damaged or cut short"):
        load(data_config(tmp_path, kinds=("caption",), workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_cut_while_it_is_read_is_named(tmp_path, workers):
    make_dataset(tmp_path / "caption", num_documents=200, shard_documents=200)
    config = data_config(tmp_path, kinds=("caption",), workers=workers)
    batches = iter(make_loader(config, end=10_000))
    next(batches)
    os.truncate(tmp_path / "caption" / "train" / "shard-00000.arrow", 8192)
    with pytest.raises(InputError, match=r"shard-00000\.arrow: damaged or cut short"):
        list(batches)


def test_a_dead_worker_raises_only_where_its_batch_is_awaited(folder):
    """PyTorch's own handler of SIGCHLD raises in whatever runs when the worker dies: here, in the sleep."""
    batches = iter(make_loader(data_config(folder, workers=1), end=10_000))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)
    with pytest.raises(RunError, match="Killed"):
        list(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_in_an_image_is_named(tmp_path, workers):
    make_dataset(tmp_path / "caption", num_documents=10)
    file = tmp_path / "caption" / "train" / "shard-00000.arrow"
    data = bytearray(file.read_bytes())
    data[data.rindex(b"IEND") - 100] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"shard-00000\.arrow: document 'train-\d+' is damaged, its checksum"):
        load(data_config(tmp_path, kinds=("caption",), workers=workers))


def test_a_dead_worker_is_told(folder, monkeypatch):
    def die(data):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(images, "decode", die)  # the forked worker inherits this
    with pytest.raises(RunError, match=r"loader process died .*Killed.* data\.workers"):
        load(data_config(folder, workers=1))


def test_workers_end_with_the_loader(folder):
    before = multiprocessing.active_children()
    batches = iter(make_loader(data_config(folder, workers=2), end=10_000))
    next(batches)
    batches.close()
    assert multiprocessing.active_children() == before


def rows_of(batches: list[Batch]) -> list[bytes]:
    """Each row as bytes, sorted: a step's rows whatever their order."""
    batch = join(batches)
    return sorted(row.numpy().tobytes() for row in batch.tokens)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_dealt_by_work_are_the_rows_of_the_step(folder, workers):
    """Every row once, whatever the ranks and micro-batches; their work is more even than in order."""

    def work(contents) -> np.ndarray:
        return contents.patches

    config, batch = data_config(folder, workers=workers), 16
    whole = [rows_of(step) for step in load(config, batch=batch)]
    for num_ranks, micro_rows in ((1, 4), (2, None), (2, 2), (4, 4), (4, 3)):
        settings = {"batch": batch, "num_ranks": num_ranks, "micro_rows": micro_rows, "work": work}
        ranks = [load(config, rank=rank, **settings) for rank in range(num_ranks)]
        steps = list(zip(*ranks, strict=True))
        assert [rows_of([b for micro in step for b in micro]) for step in steps] == whole
        late = load(config, rank=num_ranks - 1, start=2, **settings)
        assert torch.equal(join(late[0]).tokens, join(steps[2][-1]).tokens)
    spreads = []
    for deal in (None, work):
        ranks = [load(config, rank=rank, num_ranks=4, batch=batch, work=deal) for rank in range(4)]
        loads = [[sum(len(b.patches) for b in micro) for micro in step] for step in zip(*ranks, strict=True)]
        spreads.append(sum(max(step) - min(step) for step in loads))
    assert spreads[1] < spreads[0] / 2
