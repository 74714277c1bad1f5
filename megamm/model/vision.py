"""What turns image patches into decoder features: one linear layer (early fusion) or a ViT (late fusion)."""

import torch
from megamm_kernels import AttentionPlan, project_patches, rope_table
from torch import nn

from megamm.model.layers import Block, Linear, RMSNorm


class PatchProjection(nn.Module):
    """One linear map from pixels to the residual stream."""

    def __init__(self, patch_dim: int, width: int):
        super().__init__()
        self.projection = Linear(patch_dim, width, patch_dim**-0.5)

    def forward(self, patches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 [P, patch_dim] -> features [P, width]."""
        return project_patches(patches, self.projection.weight, dtype)


class VisionTower(nn.Module):
    """Late fusion: a transformer over each image's patches, then a projection to the decoder's width."""

    def __init__(
        self, *, patch_dim: int, patches_per_image: int, width: int, head_dim: int, hidden: int, depth: int,
        out_width: int, rope_theta: float, eps: float,
    ):  # fmt: skip
        super().__init__()
        self.patches_per_image, self.head_dim, self.rope_theta = patches_per_image, head_dim, rope_theta
        self.embed = PatchProjection(patch_dim, width)
        self.blocks = nn.ModuleList(Block(width, head_dim, hidden, depth, eps) for _ in range(depth))
        self.norm = RMSNorm(width, eps)
        self.projector = Linear(width, out_width, width**-0.5)

    def forward(self, patches: torch.Tensor, dtype: torch.dtype, plan: AttentionPlan) -> torch.Tensor:
        """uint8 [num_images * patches_per_image, patch_dim] -> features [P, out_width]; ``plan``: a row per image."""
        x_blw = self.embed(patches, dtype).unflatten(0, (-1, self.patches_per_image))
        positions = torch.arange(self.patches_per_image, device=patches.device)[None]
        cos, sin = rope_table(positions, self.head_dim, self.rope_theta)
        for block in self.blocks:
            x_blw = block(x_blw, cos, sin, plan)
        return self.projector(self.norm(x_blw)).flatten(0, 1)
