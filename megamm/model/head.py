"""The last part of a model: norm, vocabulary matrix, and the loss where a label exists."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megamm_kernels import linear_cross_entropy
from torch import nn

from megamm.config import ModelConfig
from megamm.model.layers import RMSNorm
from megamm.sequence import LABEL_KINDS, Batch


class LossOutput(NamedTuple):
    """Summed next-token losses of a batch.

    Attributes:
        loss: scalar, differentiable; the sum over labelled positions, in nats.
        sums: float32 [num_sources, num_label_kinds], the same sum split up, detached.
        counts: float32, same shape; number of labels.
        auxiliary: scalar, differentiable; weighted auxiliary losses of the routers, a sum over positions without
            padding (divide it by their number in the whole batch); 0 where there are no routers.
    """

    loss: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor
    auxiliary: torch.Tensor


class Head(nn.Module):
    """Final norm and the vocabulary matrix: its own, or the table of the embedding, which is then passed in."""

    def __init__(self, config: ModelConfig, num_sources: int):
        super().__init__()
        self.shape = (num_sources, len(LABEL_KINDS))
        # Small logits at first: the loss begins near the log of the vocabulary.
        self.initial = {"weight": 1 / config.width}
        self.norm = RMSNorm(config.width, config.norm_eps)
        shape = (config.vocab_size, config.width)
        self.weight = None if config.tied_embeddings else nn.Parameter(torch.empty(shape))
        self.cross_entropy = linear_cross_entropy  # what cuts the vocabulary replaces it

    def forward(
        self,
        x_bsw: torch.Tensor,
        batch: Batch,
        auxiliary: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
    ) -> LossOutput:
        """Next-token loss on labelled positions; only their rows meet the vocabulary matrix.

        Args:
            table: the matrix [V, W] of a head that has none of its own.
        """
        # As int: 256 sources times two kinds do not fit in uint8.
        group = batch.source.int() * self.shape[1] + batch.label_kind
        loss, sums, counts, _ = self.cross_entropy(
            self.norm(x_bsw).flatten(0, 1),
            self.weight if table is None else table,
            batch.targets.flatten(),
            batch.label_index,
            group.flatten(),
            math.prod(self.shape),
        )
        # A tensor in any case, so that callers need not ask what kind of model it is.
        auxiliary = torch.zeros_like(loss) if auxiliary is None else auxiliary
        return LossOutput(loss, sums.view(self.shape), counts.view(self.shape), auxiliary)

    def logits(self, x_bsw: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, V] of every position, in the dtype of ``x_bsw``: for generation and tests."""
        weight = self.weight if table is None else table
        return F.linear(self.norm(x_bsw), weight.to(x_bsw.dtype))
