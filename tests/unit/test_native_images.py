"""Images in their own shape: grids, what rows, models, counts and prompts make of them, against plain walks."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dataset_factory import make_dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_factory import model_config
from naive_blocks import Naive, rms
from PIL import Image, ImageDraw
from run_factory import run_until, trainer
from tokenizers import Tokenizer as Words

from megamm.config import DataConfig, SourceConfig, VisionConfig, load
from megamm.data import images
from megamm.data.balance import row_contents
from megamm.data.dataset_info import read_dataset_info
from megamm.data.loader import Loader, build_pack_plan, open_sources
from megamm.data.picture import draw_row
from megamm.data.prepare import PrepareSettings, prepare
from megamm.data.shards import ShardedDataset
from megamm.data.tokenizer import Tokenizer, train_tokenizer
from megamm.data.verify import verify
from megamm.errors import InputError
from megamm.estimate.tokens import stats_of_sources
from megamm.generation.prompts import PromptMaker, prompt_batch
from megamm.model.counts import exact_flops_per_token
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.context import cut_batch
from megamm.parallel.mesh import Axis
from megamm.resolve import resolve_config
from megamm.sequence import IMAGE, Batch, grid_positions, keys_seen

PATCH, SIDE = 4, 4  # at most 16 patches of an image
SHAPES = {"wide": (9, 40), "tall": (33, 12), "square": (50, 50), "tiny": (3, 2), "line": (1, 300), "small": (7, 5)}


def natively(height: int, width: int, patch: int = PATCH, side: int = SIDE) -> tuple[int, int]:
    """Rows and columns of a picture's grid."""
    made = images.resize(np.zeros((height, width, 3), np.uint8), side * patch, "native", patch)
    assert not made.shape[0] % patch and not made.shape[1] % patch
    return made.shape[0] // patch, made.shape[1] // patch


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 30), st.integers(1, 20))
@example(1, 60_000, 16, 20)
@settings(max_examples=150, deadline=None)
def test_a_grid_is_the_largest_that_the_budget_allows(height, width, patch, side):
    rows, columns = natively(height, width, patch, side)
    budget, scale = side * side, images.native_scale(height, width, patch, side * side)
    assert 1 <= rows * columns <= budget and 0 < scale <= 1
    # No grid within the budget lets the picture be larger, and this one is no larger than the picture needs.
    best = max(min(r * patch / height, budget // r * patch / width, 1) for r in range(1, budget + 1))
    assert scale == pytest.approx(best, rel=1e-12)
    for side_of_grid, length in ((rows, height), (columns, width)):
        assert (side_of_grid - 1) * patch < max(1, length * scale + 0.5)
        assert side_of_grid * patch >= length * scale - 0.5


def test_a_circle_stays_a_circle():
    for height, width in ((300, 420), (600, 130)):
        picture = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(picture).ellipse((20, 30, 120, 130), fill="black")
        found = images.resize(np.asarray(picture), 84, "native", 14)
        dark = np.argwhere(found[..., 0] < 128)
        high, wide = dark.max(0) - dark.min(0)
        assert abs(int(high) - int(wide)) <= 1 and high > 8
        assert (len(dark) / (high + 1) ** 2) == pytest.approx(np.pi / 4, abs=0.06)


def test_a_square_as_large_as_all_patches_is_that_of_pad():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(images.resize(picture, 32, "native", 8), images.resize(picture, 32, "pad"))


def test_a_crop_keeps_the_shape_and_patches_can_be_put_together():
    picture = np.random.default_rng(0).integers(0, 256, (8, 56, 3), dtype=np.uint8)
    shapes = {images.augment(picture, np.random.default_rng(i), 0.4, True).shape for i in range(20)}
    assert shapes == {(8, 56, 3)}
    patches = images.patchify(picture, 4)
    np.testing.assert_array_equal(images.unpatchify(patches, (2, 14)), picture)
    assert images.on_grid(patches, (2, 14), (2, 14)) is patches
    assert images.on_grid(patches, (2, 14), (3, 1)).shape == (3, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared captions of pictures of many shapes, and ``tokenizer.json``."""
    folder = tmp_path_factory.mktemp("native")
    train_tokenizer(["a word of a picture "] * 3, 280, folder / "tokenizer.json")
    rng = np.random.default_rng(0)
    (folder / "raw").mkdir()
    for n in range(40):
        name, (height, width) = list(SHAPES.items())[n % len(SHAPES)]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "raw" / f"{name}{n}.png")
        (folder / "raw" / f"{name}{n}.txt").write_text("word " * (1 + n % 3) + str(n))
    options = PrepareSettings(
        inputs=(str(folder / "raw"),),
        tokenizer=str(folder / "tokenizer.json"),
        image_size=PATCH * SIDE,
        patch_size=PATCH,
        max_length=80,
        fit="native",
        val_fraction=0.1,
    )
    prepare(options, folder / "data")
    return folder


def data_config(folder, **changes) -> DataConfig:
    values = {"row_length": 96, "window_tokens": 600, "workers": 0} | changes
    return DataConfig(sources={"captions": SourceConfig(path=str(folder / "data"))}, **values)


def batches(config: DataConfig, **options) -> list[list[Batch]]:
    datasets = open_sources(config, "train")
    plan = build_pack_plan(datasets, [1.0], config)
    return list(Loader(plan, datasets, config, **({"global_batch_rows": 4, "end_step": 4} | options)))


def test_prepared_data_tell_the_shape_of_each_image(folder):
    info = verify(folder / "data")
    assert info["format_version"] == 3
    dataset = ShardedDataset(folder / "data", "train")
    sizes = dataset.sizes()
    for index in range(len(dataset)):
        found = dataset[index]
        name = "".join(c for c in found.id.rsplit("/", 1)[-1].split(".")[0] if c.isalpha())
        shapes = [tuple(side // PATCH for side in images.decode(data).shape[:2]) for data in found.images]
        assert shapes == [natively(*SHAPES[name])], found.id
        patches = [rows * columns for rows, columns in shapes]
        assert (-found.layout[found.layout < 0]).tolist() == patches
        held = len(found.tokens), sum(patches), len(patches), sum(n * n for n in patches)
        assert tuple(int(column[index]) for column in sizes) == held
    assert len(set(sizes.patches.tolist())) > 3


def test_older_programs_refuse_and_older_data_stay_as_they_were(folder, tmp_path):
    square = make_dataset(tmp_path / "square", num_documents=5)
    assert read_dataset_info(square)["format_version"] == 2
    assert np.load(square / "train" / "lengths.npy").shape == (5, 2)
    info = json.loads((square / "dataset.json").read_text())
    (square / "dataset.json").write_text(json.dumps(info | {"format_version": 3}))
    with pytest.raises(InputError, match="prepare the dataset again"):
        _ = ShardedDataset(square, "train").lengths
    (square / "dataset.json").write_text(json.dumps(info | {"format_version": 4}))
    with pytest.raises(InputError, match="this version reads 2 and 3"):
        read_dataset_info(square)


def test_rows_resume_and_split_among_ranks_the_same(folder):
    """Crops and flips too: they depend on the seed, the row and the image alone."""
    config = data_config(folder)
    config.augment.crop_scale_min, config.augment.flip = 0.4, True
    whole = [batch for (batch,) in batches(config)]
    assert len({tuple(grid) for batch in whole for grid in batch.grids.tolist()}) > 3
    for batch in whole:
        assert batch.grids.prod(1).sum() == len(batch.patches) == len(batch.patch_index)
    later = [batch for (batch,) in batches(config, start_step=2)]
    config.workers = 1
    ranks = [batches(config, rank=r, num_ranks=2, micro_rows=1) for r in range(2)]
    for step, batch in enumerate(whole):
        if step >= 2:
            assert all(torch.equal(value, getattr(batch, name)) for name, value in vars(later[step - 2]).items())
        parts = [part for rank in ranks for part in rank[step]]
        assert len(parts) == 4
        for name in ("tokens", "patches", "grids", "hi"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name


class NaiveTower(Naive):
    """One image at a time through a tower's blocks."""

    def __init__(self, model: MultimodalModel):
        vision, self.p = model.config.vision, dict(model.vision.named_parameters())
        self.model, self.biases = model.config, {}
        self.config = SimpleNamespace(
            norm_eps=model.config.norm_eps,
            head_dim=vision.head_dim,
            key_heads=vision.width // vision.head_dim,
            rope_theta=model.config.rope_theta,
            image_mask="bidirectional",
            per_modality="none",
            experts=SimpleNamespace(num=0),
        )

    def position(self, batch, r, s):
        return divmod(s, batch.columns) if self.model.image_positions == "grid" else (s, s)

    def features(self, image: np.ndarray) -> torch.Tensor:
        """uint8 [H, W, 3] -> [patches of the model, W]."""
        size = self.model.vision.patch_size or self.model.patch_size
        rows, columns, ratio = image.shape[0] // size, image.shape[1] // size, self.model.patch_size // size
        x = []
        for row in range(rows):
            for column in range(columns):
                patch = image[row * size : (row + 1) * size, column * size : (column + 1) * size]
                pixels = torch.tensor(patch.astype(np.float64)).flatten() / 127.5 - 1
                x.append(self.p["embed.projection.weight"] @ pixels)
        n = rows * columns
        zeros = torch.zeros(1, n, dtype=torch.int64)
        row = SimpleNamespace(tokens=zeros + IMAGE, lo=zeros, hi=zeros + n - 1, columns=columns)
        for i in range(self.model.vision.depth):
            x, _ = self.block(f"blocks.{i}.", x, list(range(n)), row, 0)
        x = [rms(one, self.p["norm.weight"], self.config.norm_eps) for one in x]
        joined = []
        for top in range(0, rows, ratio):
            for left in range(0, columns, ratio):
                near = [x[(top + i) * columns + left + j] for i in range(ratio) for j in range(ratio)]
                joined.append(self.p["projector.weight"] @ torch.cat(near))
        return torch.stack(joined)


class NaiveModel(Naive):
    """Losses with features made by :class:`NaiveTower`, or pixels projected one patch at a time."""

    def losses(self, batch: Batch):
        features, start = [], 0
        for rows, columns in batch.grids.tolist():
            patches = batch.patches[start : start + rows * columns]
            start += rows * columns
            if self.config.architecture == "late":
                features.append(self.tower.features(images.unpatchify(patches.numpy(), (rows, columns))))
            else:
                features.append((patches.double() / 127.5 - 1) @ self.p["embedding.projection.weight"].T)
        made, self.vision = torch.cat(features), lambda *_: None
        self.embedding = lambda batch, *_: self.stream(batch, made)
        return super().losses(batch)

    def stream(self, batch: Batch, features: torch.Tensor) -> torch.Tensor:
        x = self.p["embedding.weight"][batch.tokens.long()].flatten(0, 1).clone()
        x[batch.patch_index] = features
        return x.unflatten(0, batch.tokens.shape)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("early", {"image_positions": "grid"}),
        ("early", {"image_positions": "sequence", "image_mask": "causal"}),
        ("late", {"image_positions": "sequence"}),
        ("late", {"image_positions": "grid", "vision": {"patch_size": 2}}),
    ],
)
def test_models_see_each_image_in_its_shape(folder, architecture, options):
    (batch,) = batches(data_config(folder, row_length=80), global_batch_rows=3, end_step=1)[0]
    sizes = {"vocab_size": 280, "image_size": PATCH * SIDE, "patch_size": PATCH, "width": 16, "head_dim": 8}
    vision = VisionConfig(**{"width": 16, "depth": 1, "head_dim": 8} | options.pop("vision", {}))
    model = MultimodalModel(model_config(architecture, **sizes, **options, vision=vision, depth=1), seed=1).double()
    naive = NaiveModel(model)
    naive.tower = NaiveTower(model) if architecture == "late" else None
    with torch.no_grad():
        wanted, _ = naive.losses(batch)
        assert len({tuple(grid) for grid in batch.grids.tolist()}) > 2
        assert model(batch, torch.float64).loss == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_of_a_row_find_every_image_and_place(folder, num_ranks):
    (batch,) = batches(data_config(folder, row_length=96))[0]
    cuts = [cut_batch(batch, Axis(rank=r, size=num_ranks), SIDE**2, on_grid=True) for r in range(num_ranks)]
    # Every rank's tower gives equally many features, in one row; here a patch is its own feature.
    assert len({len(cut.patches) for cut in cuts}) == 1 and not len(cuts[0].patches) % SIDE**2
    assert all(cut.grids.prod(1).sum() == len(cut.patches) < len(cut.grids) * SIDE**2 for cut in cuts)
    features = torch.cat([cut.patches for cut in cuts])
    places = torch.stack(grid_positions(batch.positions, batch.patch_index, batch.grids))
    for cut, own in zip(cuts, cuts[0].own_positions, strict=True):
        assert torch.equal(cut.grid_places, places.gather(2, own.expand(2, -1, -1)))
        # Of each position of the whole rows, the number of its patch.
        number = torch.full((batch.tokens.numel(),), -1).index_copy(
            0, batch.patch_index, torch.arange(len(batch.patches))
        )
        mine = number.view_as(batch.tokens).gather(1, own).flatten()[cut.patch_index]
        assert torch.equal(features[cut.feature_rows], batch.patches[mine.sort().values])


def test_counts_from_lengths_are_those_of_rows(folder):
    config = data_config(folder)
    datasets = open_sources(config, "train")
    (batch,) = batches(config)[0]
    contents = row_contents(build_pack_plan(datasets, [1.0], config), range(4))
    squares = batch.grids.long().prod(1) ** 2
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor([len(images_of(batch, r)) for r in range(4)]))
    np.testing.assert_array_equal(contents.image_pairs, np.bincount(rows, weights=squares.numpy(), minlength=4))
    np.testing.assert_array_equal(contents.pairs, keys_seen(batch.lo, batch.hi).sum(1))
    np.testing.assert_array_equal(contents.labels, (batch.targets >= 0).sum(1))


def images_of(batch: Batch, row: int) -> list[int]:
    """First positions of the images of a row."""
    is_image = (batch.tokens[row] == IMAGE).tolist()
    return [i for i, one in enumerate(is_image) if one and not (i and is_image[i - 1])]


def test_a_run_on_unlike_shapes_counts_and_resumes_as_ever(tmp_path):
    for seed, kind in enumerate(("caption", "text")):
        make_dataset(tmp_path / kind, kind=kind, num_documents=60, seed=seed, image_size=32, fit="native")
    options = {"model.architecture": "late", "model.image_positions": "grid", "eval.swap_images": True, "eval.rows": 2}
    options |= {"train.steps": 8, "train.batch_rows": 4}
    whole = trainer(tmp_path, tmp_path / "whole", **options)
    result = whole.run()
    assert result["losses_swapped"]["caption"]["loss"] != result["losses"]["caption"]["loss"]
    run_until(trainer(tmp_path, tmp_path / "killed", **options), 6)
    again = trainer(tmp_path, tmp_path / "killed", **options)
    assert again.run()["losses"] == result["losses"] and again.totals == whole.totals
    # The estimate from lengths alone, but for the padding of rows.
    counted = whole.flops(whole.totals)[1] / whole.totals["tokens"]
    estimated = exact_flops_per_token(whole.config.model, stats_of_sources(whole.config))
    assert estimated == pytest.approx(counted, rel=0.08)


def test_a_prompt_is_what_training_saw(folder):
    dataset = ShardedDataset(folder / "data", "train")
    maker = PromptMaker(Tokenizer(folder / "tokenizer.json"), PATCH * SIDE, PATCH, "native")
    made = []
    for index in range(4):
        found = dataset[index]
        made.append(maker.make("a word", [folder / "raw" / f"{found.id.rsplit('/', 1)[-1].split('.')[0]}.png"]))
        np.testing.assert_array_equal(made[-1].patches, images.patchify(images.decode(found.images[0]), PATCH))
    batch = prompt_batch(made)
    assert batch.grids.prod(1).tolist() == [len(prompt.patches) for prompt in made]


def test_a_tower_with_learnt_positions_is_refused(folder):
    sources = f"--data.sources.captions.path={folder / 'data'}"
    config = load(None, [sources, "--model.architecture=late", "--model.vision.kind=clip", "--train.steps=1"])
    with pytest.raises(InputError, match=r"clip has learnt positions .* --fit native; take kind megamm"):
        resolve_config(config)


def test_rows_are_drawn_in_the_shape_of_their_images(folder):
    (batch,) = batches(data_config(folder))[0]
    words = Words.from_file(str(folder / "tokenizer.json"))

    def drawn(grids: torch.Tensor) -> list[Image.Image]:
        return [draw_row(replace(batch, grids=grids), row, words, scale=1) for row in range(4)]

    # With rows and columns exchanged, long images are drawn otherwise.
    assert drawn(batch.grids) != drawn(batch.grids.flip(1))
