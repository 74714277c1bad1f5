"""What turns image patches into decoder features in late fusion: a ViT."""

import math
from dataclasses import replace

import torch
from megamm_kernels import project_patches
from torch import nn

from megamm.config import ModelConfig, RopeScalingConfig
from megamm.model.context import make_context
from megamm.model.layers import Block, FeedForward, Linear, RMSNorm
from megamm.model.pretrained_vision import PretrainedTower, cut_patches, join_features, make_projector
from megamm.model.sizes import shuffle_ratio, tower_eps, tower_hidden, tower_patch_size
from megamm.sequence import image_intervals, patches_per_image


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

    def forward(self, patches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 [num_images * patches_per_image, patch_dim] -> features [num_images, patches_per_image, W].

        A batch without images still runs, and returns, a black one: ranks whose micro-batches have images must find
        all others in the same collectives, and an optimizer step must not depend on how rows are split.
        """
        length = patches_per_image(self.config.image_size, self.config.patch_size)
        # Embedding leaves its features out, so their gradients are zero, not absent.
        patches = patches if len(patches) else patches.new_zeros(length, patches.shape[1])
        ratio = shuffle_ratio(self.config)
        patches, length = cut_patches(patches, length, ratio), length * ratio**2
        # Through the decoder's attention, whose backward is the same in each run; torch's own may add in any order on
        # CUDA.
        lo, hi = image_intervals(patches.shape[0] // length, length, patches.device)
        # [1, L], in raster order: all images have the same ones.
        order = torch.arange(length, device=patches.device)[None]
        side = math.isqrt(length)
        positions = (order // side, order % side) if self.config.image_positions == "grid" else order
        context = make_context(self.config, positions, lo, hi, self.config.vision.head_dim, dtype)
        x_blw = self.embed(patches, dtype).unflatten(0, (-1, length))
        for block in self.blocks.values():
            x_blw = block(x_blw, context)
        return self.projector(join_features(x_blw if self.norm is None else self.norm(x_blw), ratio))


def make_tower(config: ModelConfig) -> VisionTower | PretrainedTower:
    """The tower of a resolved late-fusion model."""
    return VisionTower(config) if config.vision.kind == "megamm" else PretrainedTower(config)
