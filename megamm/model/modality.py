"""Weights of their own for text and for images: a feed-forward layer each, or a whole block each.

Every position goes where its modality says; padding goes with text. The host knows how many image positions a batch
has, so that both parts are plain matrix products over a known number of rows.
"""

import torch
from megamm_kernels import interval_attention
from torch import nn

from megamm.model.context import BlockContext
from megamm.model.layers import Block, FeedForward


class ModalityFeedForward(nn.Module):
    """One feed-forward layer for text and one for images: the modality-aware baseline of arXiv 2504.07951."""

    def __init__(self, width: int, hidden: int, depth: int):
        super().__init__()
        self.text = FeedForward(width, hidden, depth)
        self.image = FeedForward(width, hidden, depth)

    def forward(self, x_blw: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """[B, L, W] -> [B, L, W]."""
        # Two products over known numbers of rows; a part without rows is an empty product, so both have gradients
        # always.
        text, image = context.modalities.split(x_blw)
        return context.modalities.join(self.text(text), self.image(image), x_blw.shape[:2])


class ModalityBlock(nn.Module):
    """A block of a mixture of transformers (arXiv 2411.04996).

    Norms, attention matrices and feed-forward layer belong to a modality; attention is over all positions.

    Args:
        text, image: blocks whose parts are used.
    """

    def __init__(self, text: Block, image: Block):
        super().__init__()
        self.text, self.image = text, image
        self.attend = interval_attention

    def forward(self, x_blw: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """[B, L, W] -> [B, L, W]."""
        shape, blocks, modalities = x_blw.shape[:2], (self.text, self.image), context.modalities
        # Positions that are sorted by modality need their own angles beside them.
        tables = zip(*(self._table(table, context, shape) for table in (context.cos, context.sin)), strict=True)
        streams = modalities.split(x_blw)
        heads = [
            block.attention.heads(block.attention_norm(x), *table)
            for block, x, table in zip(blocks, streams, tables, strict=True)
        ]
        # Together again, in the order of rows: the mask is one of rows.
        q, k, v = (modalities.join(text, image, shape) for text, image in zip(*heads, strict=True))
        attended = modalities.split(self.attend(q, k, v, context.mask).flatten(2))
        text, image = map(self._rest, blocks, streams, attended)
        return modalities.join(text, image, shape)

    @staticmethod
    def _rest(block: Block, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What a modality does alone with what attention gave it."""
        # The second half of Block.forward, over the rows of one modality.
        normed, x = block.feed_forward_norm(block.attention.out(attended), residual=x)
        return x + block.feed_forward(normed)

    @staticmethod
    def _table(table: torch.Tensor, context: BlockContext, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        return context.modalities.split(table.expand(*shape, -1, -1))  # the table may be one for all rows
