"""Validation: the same packed rows of every source's val split, each time."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from megamm.data.batch import Batch
from megamm.data.tokens import MODALITIES
from megamm.parallel.mesh import World


def swap_images(batch: Batch, patches_per_image: int) -> Batch:
    """The batch with each image replaced by the one before it (the first by the last)."""
    images = batch.patches.unflatten(0, (-1, patches_per_image))
    return replace(batch, patches=images.roll(1, 0).flatten(0, 1))


@torch.no_grad()
def validation_loss(
    model: nn.Module, batches: Iterable[Batch], world: World, dtype: torch.dtype, swap_patches: int = 0
) -> dict[str, float]:
    """Mean loss over all labels of one source, and per modality, in nats.

    Args:
        batches: this rank's share; all ranks have equally many.
        swap_patches: patches per image, to evaluate on swapped images; 0 for the true ones.

    Returns:
        ``{"loss": ..., "text": ..., "text_after_image": ...}``, modalities without labels left out.
    """
    totals = torch.zeros(2, len(MODALITIES), dtype=torch.float64)
    for batch in batches:
        batch = batch.to(world.device)
        if swap_patches and batch.patches.shape[0]:
            batch = swap_images(batch, swap_patches)
        output = model(batch, dtype)
        totals += torch.stack((output.sums.sum(0), output.counts.sum(0))).double().cpu()
    sums, counts = world.all_reduce(totals)
    losses = {"loss": (sums.sum() / counts.sum()).item()}
    losses |= {name: (sums[m] / counts[m]).item() for m, name in enumerate(MODALITIES) if counts[m] > 0}
    return losses
