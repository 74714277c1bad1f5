"""Validation: the same packed rows of every source's val split, each time, whatever the ranks and micro-batches.

Rows 0 to N-1 of a source's plan are dealt to the data ranks; each share is filled up with empty rows, so that all make
equally many passes. Images are numbered through all N rows: with swapped images, image i has the
pixels of image i-1, and image 0 those of the last one, wherever they are computed; of another shape, stretched to that
of the image in whose place they are.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from megamm.config import AugmentConfig, DataConfig
from megamm.data.images import on_grid
from megamm.data.loader import build_pack_plan
from megamm.data.rows import RowReader
from megamm.data.shards import ShardedDataset
from megamm.parallel.engine import Engine
from megamm.parallel.mesh import World
from megamm.sequence import LABEL_KINDS, Batch

Picture = tuple[torch.Tensor, tuple[int, int]]
"""Patches of an image, and the rows and columns of its grid."""


class ValidationRows:
    """The rows that one source is validated on.

    Args:
        dataset: its val split.
        config: of the training data.
        num_rows: how many.
        options: ``cache_dir`` and ``world`` of :func:`megamm.data.loader.build_pack_plan`.

    Raises:
        InputError: the split is empty or has a document longer than a row.
    """

    def __init__(self, dataset: ShardedDataset, config: DataConfig, num_rows: int, **options):
        self.num_rows = num_rows
        self.has_images = bool(dataset.info["splits"][dataset.split]["num_images"])
        # A plan of this source alone: its rows do not change when the mixture does.
        plan = build_pack_plan([dataset], [1.0], config, num_rows=num_rows, **options)
        self._reader = RowReader(plan, [dataset], AugmentConfig(), config.seed)  # without augmentation

    def passes(self, world: World, swapped: bool = False) -> Iterator[list[Batch]]:
        """This rank's share in order, in lists of micro-batches that a pipeline takes at once; else of one each."""
        layout, in_stages = world.layout, world.layout.pipeline > 1
        pass_rows = layout.micro_rows * (layout.micro_batches if in_stages else 1)
        # Rounded up: all ranks make equally many passes, and the last ones fill up with padding, which has no labels.
        share = -(-self.num_rows // world.data_size)
        first = world.data_rank * share
        end = min(first + share, self.num_rows)
        length = -(-share // pass_rows) * pass_rows if in_stages else share  # stages pass on a fixed shape
        numbers = [row if row < end else None for row in range(first, first + length)]
        # The last image of the rank before: swapping goes through all rows, as if they were on one rank.
        before = self._image_before(first) if swapped and first < self.num_rows else None
        for start in range(0, length, pass_rows):
            batches = []
            for begin in range(start, min(start + pass_rows, length), layout.micro_rows):
                batch = self._reader.read(numbers[begin : begin + layout.micro_rows])
                if before is not None and len(batch.patches):
                    # The batch's own last image goes to the first place of the next one.
                    *pictures, before = [before, *_pictures(batch)]
                    batch = replace(batch, patches=_in_places(pictures, batch))
                batches.append(batch)
            yield batches

    def _image_before(self, row: int) -> Picture | None:
        """The last image before a row, going round at the first row; None where no row has an image."""
        # Up to the row itself, which is its own predecessor where no other row has an image.
        for back in range(1, self.num_rows + 1):
            pictures = _pictures(self._reader.read([(row - back) % self.num_rows]))
            if pictures:
                return pictures[-1]
        return None


def _pictures(batch: Batch) -> list[Picture]:
    grids = [(rows, columns) for rows, columns in batch.grids.tolist()]
    sizes = [rows * columns for rows, columns in grids]
    return list(zip(batch.patches.split(sizes), grids, strict=True)) if sizes else []


def _in_places(pictures: list[Picture], batch: Batch) -> torch.Tensor:
    """``patches`` of a batch whose images are these."""
    grids = [(rows, columns) for rows, columns in batch.grids.tolist()]
    moved = [on_grid(patches.numpy(), grid, other) for (patches, grid), other in zip(pictures, grids, strict=True)]
    return torch.from_numpy(np.concatenate(moved))


def validation_loss(engine: Engine, passes: Iterator[list[Batch]], world: World) -> dict[str, float]:
    """Mean loss over all labels of one source, and per label kind, in nats.

    Args:
        passes: this rank's share; all ranks have equally many.

    Returns:
        ``{"loss": ..., "text": ..., "text_after_image": ...}``, kinds without labels left out.

    Raises:
        InputError, RunError: a shard or a document is damaged, on any rank.
    """
    # Float64: the mean must not depend on how many partial sums it was added up from.
    totals = torch.zeros(2, len(LABEL_KINDS), dtype=torch.float64)
    while True:
        # Reading may fail on one rank alone, so it is agreed on before the collectives of the pass.
        with world.agree():
            batches = next(passes, None)
        if batches is None:
            break
        totals += engine.evaluate(batches).double().sum(1).cpu()  # [2, sources, kinds]: only one source has labels here
    sums, counts = world.all_reduce(totals)
    losses = {"loss": (sums.sum() / counts.sum()).item()}
    losses |= {name: (sums[m] / counts[m]).item() for m, name in enumerate(LABEL_KINDS) if counts[m] > 0}
    return losses
