"""Weights of their own for text and for images: a feed-forward layer each, or a whole block each.

Every position goes where its modality says; padding goes with text. The host knows how many image positions a batch
has, so that both parts are plain matrix products over a known number of rows.
"""

from collections.abc import Callable

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
        # What ranks that hold a part of the positions and of each matrix do around both layers: parallel.tensor.
        self.enter: Callable[[torch.Tensor], torch.Tensor] = _same
        self.leave: Callable[[torch.Tensor], torch.Tensor] = _same

    def forward(self, x_blw: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """[B, L, W] -> [B, L, W]."""
        x_blw = x_blw + self.leave(self._attention(self.enter(x_blw), context))
        return x_blw + self.leave(self._feed_forward(self.enter(x_blw), context))

    def _attention(self, x_bsw: torch.Tensor, context: BlockContext) -> torch.Tensor:
        shape, blocks, modalities = x_bsw.shape[:2], (self.text, self.image), context.modalities
        # Positions that are sorted by modality need their own angles beside them.
        tables = zip(*(self._table(table, context, shape) for table in (context.cos, context.sin)), strict=True)
        heads = [
            block.attention.heads(block.attention_norm(x), *table)
            for block, x, table in zip(blocks, modalities.split(x_bsw), tables, strict=True)
        ]
        # Together again, in the order of rows: the mask is one of rows.
        q, k, v = (modalities.join(text, image, shape) for text, image in zip(*heads, strict=True))
        attended = modalities.split(self.attend(q, k, v, context.mask).flatten(2))
        text, image = (block.attention.out(x) for block, x in zip(blocks, attended, strict=True))
        return modalities.join(text, image, shape)

    def _feed_forward(self, x_bsw: torch.Tensor, context: BlockContext) -> torch.Tensor:
        streams = zip((self.text, self.image), context.modalities.split(x_bsw), strict=True)
        text, image = (block.feed_forward(block.feed_forward_norm(x)) for block, x in streams)
        return context.modalities.join(text, image, x_bsw.shape[:2])

    @staticmethod
    def _table(table: torch.Tensor, context: BlockContext, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        return context.modalities.split(table.expand(*shape, -1, -1))  # the table may be one for all rows


def _same(x: torch.Tensor) -> torch.Tensor:
    return x
