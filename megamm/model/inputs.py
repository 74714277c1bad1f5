"""The first part of a model: tokens and patches to the residual stream."""

import torch
from megamm_kernels import multimodal_embedding, multimodal_patch_embedding
from torch import nn

from megamm.model.layers import Linear
from megamm.sequence import Batch


class Embedding(nn.Module):
    """A row of the table for each token; at image positions a linear map of the pixels, or features of a tower."""

    def __init__(self, vocab_size: int, width: int, patch_dim: int | None = None, std: float = 1.0):
        """``patch_dim``: values of a patch, where the model projects pixels itself (early fusion); ``std``: of the
        table."""
        super().__init__()
        self.initial = {"weight": std}
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.projection = Linear(patch_dim, width, patch_dim**-0.5) if patch_dim else None

    def forward(self, batch: Batch, features: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The residual stream [B, S, W] before the first block.

        Args:
            batch: rows.
            features: [rows, L, W] of a tower, in the order of the batch's patches; what follows these (see
                VisionTower) has no place.
            dtype: of the result.
        """
        if self.projection is not None:  # one op looks up, projects and places
            projection, index = self.projection.weight, batch.patch_index
            return multimodal_patch_embedding(batch.tokens, self.weight, batch.patches, projection, index, dtype)
        # A tower may run on more patches, black ones at the end, whose features are cut off here.
        if features is not None:
            features = features.flatten(0, 1)[: len(batch.patches)]
        return multimodal_embedding(batch.tokens, self.weight, features, batch.patch_index, dtype)
