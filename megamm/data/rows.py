"""From the documents of a row to the arrays of a batch."""

from collections.abc import Sequence

import numpy as np
import torch

from megamm.config import AugmentConfig
from megamm.data import images
from megamm.data.pack_plan import PackPlan
from megamm.data.permutation import derive_seed
from megamm.data.shards import Example, ShardedDataset
from megamm.errors import RunError
from megamm.sequence import IGNORE, IMAGE, PAD, Batch, row_positions

FIELDS = {
    "tokens": (np.int32, PAD),
    "positions": (np.int32, 0),
    "targets": (np.int32, IGNORE),
    "source": (np.uint8, 0),
    "label_kind": (np.uint8, 0),
    "lo": (np.int32, 0),
    "hi": (np.int32, 0),
}
"""Fields with a value per position: dtype and value at padding (lo and hi get an empty interval there)."""


def fill_row(row: dict[str, np.ndarray], examples: Sequence[Example], sources: np.ndarray) -> np.ndarray:
    """Write documents, end to end, into one row.

    Args:
        row: views [S] of the batch's fields, as in :data:`FIELDS`, already holding padding.
        examples: the documents, no longer than S together.
        sources: integers [num_documents]; source index of each.

    Returns:
        bool [S]: image positions.
    """
    # The one place that knows the mask's rule: training, drawing and tests ask it.
    padded = row_positions([e.layout for e in examples], len(row["tokens"]))
    document_sizes = [np.abs(e.layout).sum() for e in examples]
    end = int(sum(document_sizes))
    start, is_image = padded.start[:end], padded.is_image[:end]
    # <image> is not stored: the layout tells where images are.
    tokens = np.full(end, IMAGE, np.int32)
    tokens[~is_image] = np.concatenate([e.tokens for e in examples])
    row["tokens"][:end] = tokens
    row["positions"][:end] = np.arange(end) - start
    # Text after text of the same document. The first token of the next one is nobody's to predict.
    labelled = ~is_image[:-1] & ~is_image[1:] & (start[:-1] == start[1:])
    row["targets"][: end - 1][labelled] = tokens[1:][labelled]
    # At every position of a document, though only labelled ones are read.
    row["source"][:end] = np.repeat(sources, document_sizes)
    patches_before = np.cumsum(is_image) - is_image
    # Whether any patch has come since the document began.
    row["label_kind"][: end - 1] = labelled & (patches_before > patches_before[start])[:-1]
    row["lo"][:], row["hi"][:] = padded.lo, padded.hi
    return padded.is_image


def picture_arrays(pictures: Sequence[np.ndarray], patch_size: int) -> dict[str, np.ndarray]:
    """``patches`` and ``grids`` of a batch.

    Args:
        pictures: uint8 [H, W, 3] in row order, sides multiples of ``patch_size``.
    """
    # Without images patches still have their width, which the model's projection expects.
    none = [np.zeros((0, patch_size * patch_size * 3), np.uint8)]
    return {
        "patches": np.concatenate([images.patchify(picture, patch_size) for picture in pictures] or none),
        "grids": np.array([picture.shape[:2] for picture in pictures], np.int32).reshape(-1, 2) // max(1, patch_size),
    }


class RowReader:
    """Reads rows of a plan as batches.

    Args:
        plan: which documents lie in which row.
        datasets: the plan's sources.
        augment: image augmentation; drawn from (seed, row, number of the image in its row).
        seed: seed of the augmentation.
    """

    def __init__(self, plan: PackPlan, datasets: Sequence[ShardedDataset], augment: AugmentConfig, seed: int):
        self.plan, self.datasets, self.augment, self.seed = plan, datasets, augment, seed

    def read(self, rows: Sequence[int | None]) -> Batch:
        """Rows of the plan as one batch; None is a row of padding.

        Raises:
            InputError: a shard is damaged.
            RunError: a document is damaged; names dataset and document.
        """
        shape = len(rows), self.plan.row_length
        # Filled with padding first: documents write over it, and what is left over is right.
        arrays = {name: np.full(shape, value, dtype) for name, (dtype, value) in FIELDS.items()}
        is_image = np.zeros(shape, bool)
        pictures: list[np.ndarray] = []
        for b, i in enumerate(rows):
            if i is None:
                padding = row_positions([], self.plan.row_length)
                arrays["lo"][b], arrays["hi"][b] = padding.lo, padding.hi
                continue
            sources, documents = self.plan.row(i)
            datasets = [self.datasets[s] for s in sources]
            examples = [_read(d, int(j)) for d, j in zip(datasets, documents, strict=True)]
            # a[b] are views, so the row is written in place.
            is_image[b] = fill_row({name: a[b] for name, a in arrays.items()}, examples, sources)
            # Images are numbered within the row, so that their augmentation does not depend on which rows are read
            # together.
            first = len(pictures)
            for dataset, example in zip(datasets, examples, strict=True):
                pictures += self._pictures(dataset, example, i, len(pictures) - first)
        size = max((d.info["patch_size"] or 0 for d in self.datasets), default=0)
        return Batch(
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
            **{name: torch.from_numpy(array) for name, array in picture_arrays(pictures, size).items()},
            patch_index=torch.from_numpy(np.flatnonzero(is_image)),
            label_index=torch.from_numpy(np.flatnonzero(arrays["targets"] >= 0)),
        )

    def _pictures(self, dataset: ShardedDataset, example: Example, row: int, first: int) -> list[np.ndarray]:
        """Pixels of each image of a document; ``first`` counts the images before it in the row."""
        size = dataset.info["patch_size"]
        found = []
        for k, (data, span) in enumerate(zip(example.images, example.layout[example.layout < 0], strict=True)):
            try:
                image = images.decode(data)
                if self.augment.flip or self.augment.crop_scale_min < 1:
                    # By row, not by document: the next epoch has it in another row, and sees another crop.
                    rng = np.random.default_rng(derive_seed(self.seed, row, first + k))
                    image = images.augment(image, rng, self.augment.crop_scale_min, self.augment.flip)
                rows, columns = image.shape[0] // size, image.shape[1] // size
                if rows * columns != -span or image.shape[:2] != (rows * size, columns * size):
                    raise images.ImageError(f"has {rows * columns} patches, the document counts {-span}")
            except (images.ImageError, ValueError) as error:
                raise _damaged(dataset, example, f"image {k}: {error}") from error
            found.append(image)
        return found


def _read(dataset: ShardedDataset, index: int) -> Example:
    """A document whose parts agree with each other and with the length that the plan knows."""
    example = dataset[index]
    num_patches = -int(example.layout[example.layout < 0].sum())
    # The plan packed by lengths.npy: a longer document would not fit its row.
    if (len(example.tokens), num_patches) != tuple(dataset.lengths[index].tolist()):
        raise _damaged(dataset, example, "its length is not that of lengths.npy")
    if int(example.layout[example.layout > 0].sum()) != len(example.tokens):
        raise _damaged(dataset, example, "its layout does not fit its tokens")
    if int((example.layout < 0).sum()) != len(example.images):
        raise _damaged(dataset, example, "its layout does not fit its images")
    # On a GPU an id beyond the table is an assertion that ends the process without naming the document.
    if len(example.tokens) and not 0 <= example.tokens.min() <= example.tokens.max() < dataset.info["vocab_size"]:
        raise _damaged(dataset, example, "it has token ids outside the vocabulary")
    return example


def _damaged(dataset: ShardedDataset, example: Example, reason: str) -> RunError:
    return RunError(
        f"{dataset.path}: document {example.id!r} of the {dataset.split} split is damaged ({reason}); "
        "prepare the dataset again"
    )
