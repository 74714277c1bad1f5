"""What turns image patches into decoder features in late fusion: a ViT."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from megamm_kernels import project_patches
from torch import nn

from megamm.config import ModelConfig, RopeScalingConfig
from megamm.model.context import make_context
from megamm.model.layers import Block, FeedForward, Linear, RMSNorm
from megamm.model.pretrained_vision import (
    PretrainedTower,
    cut_patches,
    join_features,
    make_projector,
    or_black,
    raster_places,
)
from megamm.model.sizes import shuffle_ratio, tower_eps, tower_hidden, tower_patch_size
from megamm.sequence import image_intervals, patch_order, patches_per_image


class PatchProjection(nn.Module):
    """One linear map from pixels to the tower's width."""

    def __init__(self, patch_dim: int, width: int):
        super().__init__()
        self.projection = Linear(patch_dim, width, patch_dim**-0.5)

    def forward(self, patches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 [P, patch_dim] -> features [P, width]."""
        return project_patches(patches, self.projection.weight, dtype)


class VisionTower(nn.Module):
    """Late fusion: a transformer over each image's patches, then a projection to the decoder's width."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        vision = config.vision
        hidden = tower_hidden(config)
        sizes = vision.width, vision.head_dim, vision.width // vision.head_dim, vision.depth, tower_eps(config)
        self.config = replace(config, rope_scaling=RopeScalingConfig())  # rows of an image stay as long as they are
        self.embed = PatchProjection(3 * tower_patch_size(config) ** 2, vision.width)
        self.blocks = nn.ModuleDict(
            {str(i): Block(*sizes, FeedForward(vision.width, hidden, vision.depth)) for i in range(vision.depth)}
        )
        self.norm = RMSNorm(vision.width, tower_eps(config)) if vision.final_norm else None
        self.projector = make_projector(config)

    def forward(self, patches: torch.Tensor, grids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 [P, patch_dim] of images of ``grids`` [num_images, 2] -> features [rows, L, W], the first P of them.

        Square images of the full size are rows of their own. Images of unlike shape lie end to end in one row, filled
        up with black patches that nobody sees, so that its length is a multiple of a full image.

        A batch without images still runs, and returns, a black one: ranks whose micro-batches have images must find
        all others in the same collectives, and an optimizer step must not depend on how rows are split.
        """
        full, ratio = patches_per_image(self.config.image_size, self.config.patch_size), shuffle_ratio(self.config)
        # Embedding leaves features of black patches out, so their gradients are zero, not absent.
        patches, grids = or_black(patches, grids, full)
        raster = raster_places(grids, len(patches), ratio)
        patches, grids, full = cut_patches(patches, raster, ratio), grids * ratio, full * ratio**2
        num_images, num_patches = len(grids), len(patches)
        # No image is larger than a full one: only full ones can add up to as much. Asking for their sizes would wait
        # for the device.
        rows, missing = (num_images, 0) if num_images * full == num_patches else (1, -num_patches % full)
        # Through the decoder's attention, whose backward is the same in each run; torch's own may add in any order on
        # CUDA.
        lo, hi = image_intervals(grids, num_patches)
        order, columns = patch_order(grids, num_patches)
        on_grid = self.config.image_positions == "grid"
        places = [order // columns, order % columns] if on_grid else [order]
        # From here on [rows, L]. Padding sees nothing: lo is its own place, hi the one before.
        own = torch.arange(num_patches, num_patches + missing, dtype=torch.int32, device=lo.device)
        starts = torch.arange(rows, dtype=torch.int32, device=lo.device)[:, None] * full
        lo, hi = (torch.cat((one, more)).view(rows, -1) - starts for one, more in ((lo, own), (hi, own - 1)))
        places = [F.pad(one, (0, missing)).view(rows, -1) for one in places]
        positions = (places[0], places[1]) if on_grid else places[0]
        context = make_context(self.config, positions, lo, hi, self.config.vision.head_dim, dtype)
        x_blw = self.embed(F.pad(patches, (0, 0, 0, missing)), dtype).unflatten(0, (rows, -1))
        for block in self.blocks.values():
            x_blw = block(x_blw, context)
        return self.projector(join_features(x_blw if self.norm is None else self.norm(x_blw), raster, ratio))


def make_tower(config: ModelConfig) -> VisionTower | PretrainedTower:
    """The tower of a resolved late-fusion model."""
    return VisionTower(config) if config.vision.kind == "megamm" else PretrainedTower(config)
