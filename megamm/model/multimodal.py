"""The native multimodal model: one decoder over packed rows of text tokens and image patches.

    early: pixels -> one linear layer -> decoder
    late:  pixels -> ViT, per image   -> decoder
    text:  image positions keep the placeholder's embedding (a blind baseline)

A model is inputs (embedding, vision tower) -> blocks -> head; a stage of a pipeline is the same class without inputs,
without head, or with some of the blocks. Single-device mathematics only. Shape suffixes: b rows, s positions, w width.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megamm.config import ModelConfig
from megamm.model.context import BlockContext, ends_seen, make_context, position_kinds, rotary_positions
from megamm.model.experts import attach_loss, make_block
from megamm.model.head import Head, LossOutput
from megamm.model.initial import initialise
from megamm.model.inputs import Embedding
from megamm.model.sizes import resolve_model
from megamm.model.vision import make_tower
from megamm.sequence import Batch


class MultimodalModel(nn.Module):
    """Decoder with SwiGLU, RMSNorm and RoPE; by default QK-norm, untied embeddings and no biases (arXiv 2504.07951).

    On the meta device parameters have no values: initial.initialise gives them theirs once they lie somewhere.

    Args:
        config: completed in place (widths that follow from others).
        num_sources: by which losses are split.
        blocks: numbers of the blocks that it has, in a run; all by default. Their names do not depend on it.
        inputs, head: whether it has that part.
        seed: of the first values (see initial.py); by default the one that torch.manual_seed was called with.

    Attributes:
        expert_counts: int64 [depth, E, 2], text and image positions that each block's experts got in forward passes
            with gradients, since :meth:`take_expert_counts`; only with experts.
    """

    expert_counts: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        num_sources: int = 1,
        *,
        blocks: Iterable[int] | None = None,
        inputs: bool = True,
        head: bool = True,
        seed: int | None = None,
    ):
        super().__init__()
        resolve_model(config)
        self.config, self.num_sources = config, num_sources
        patch_dim = 3 * config.patch_size**2 if config.architecture == "early" else None
        std = config.width**-0.5 if config.tied_embeddings else 1.0  # as a head it gives logits of about 1
        self.embedding = Embedding(config.vocab_size, config.width, patch_dim, std) if inputs else None
        self.vision = make_tower(config) if inputs and config.architecture == "late" else None
        numbers = list(range(config.depth) if blocks is None else blocks)
        self.blocks = nn.ModuleDict({str(i): make_block(config) for i in numbers})
        self.head = Head(config, num_sources) if head else None
        if config.experts.num:
            # Counts keep the rows of the whole depth, so that stages can add theirs up.
            self.block_range = slice(numbers[0], numbers[-1] + 1) if numbers else slice(0)
            counts = torch.zeros(config.depth, config.experts.num, 2, dtype=torch.int64)
            # Not in checkpoints: they are taken after each step, and begin at zero.
            self.register_buffer("expert_counts", counts, persistent=False)
        # On the meta device there is nothing to fill yet.
        if not any(p.is_meta for p in self.parameters()):
            initialise(self, torch.initial_seed() if seed is None else seed)

    def forward(
        self,
        batch: Batch,
        dtype: torch.dtype = torch.float32,
        x_bsw: torch.Tensor | None = None,
        auxiliary_scale: float = 1.0,
    ) -> LossOutput | torch.Tensor:
        """Next-token losses of a batch.

        Args:
            batch: packed rows.
            dtype: of activations and matrix products.
            x_bsw: the residual stream [B, S, W] that enters a model without inputs.
            auxiliary_scale: of a model without a head; its auxiliary losses, times this, are part of the gradient of
                whatever the stream leads to.

        Returns:
            The losses; of a model without a head, the residual stream [B, S, W] that leaves it.
        """
        x_bsw, auxiliary = self.run_blocks(batch, dtype, x_bsw)
        if self.head is not None:
            return self.head(x_bsw, batch, auxiliary, self.tied_table)
        return x_bsw if auxiliary is None else attach_loss(x_bsw, auxiliary * auxiliary_scale)

    def run_blocks(
        self, batch: Batch, dtype: torch.dtype, x_bsw: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual stream [B, S, W] after the last block and the routers' auxiliary losses; see :meth:`forward`."""
        if self.embedding is not None:
            features = None if self.vision is None else self.vision(batch.patches, batch.grids, dtype)
            x_bsw = self.embedding(batch, features, dtype)  # a later stage is given x_bsw
        context = self.context(batch, dtype)
        for block in self.blocks.values():
            x_bsw = block(x_bsw, context)
        # Closed before the backward, in which recomputed blocks would note everything again.
        routed = context.routed.close()
        if routed is None:
            return x_bsw, None
        auxiliary, counts = routed
        # Validation must not move the experts' biases, nor count in the log.
        if torch.is_grad_enabled():
            self.expert_counts[self.block_range] += counts
        return x_bsw, auxiliary

    @property
    def tied_table(self) -> torch.Tensor | None:
        """The table [V, W] of the embedding where it is the head's matrix too."""
        return self.embedding.weight if self.config.tied_embeddings else None

    def residual_stream(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """The residual stream [B, S, W] after the last block."""
        return self.run_blocks(batch, dtype)[0]

    def take_expert_counts(self) -> torch.Tensor:
        """``expert_counts`` since the last call."""
        counts = self.expert_counts.clone()
        self.expert_counts.zero_()
        return counts

    def move_expert_bias(self, counts: torch.Tensor) -> None:
        """After an optimizer step, move the experts' biases by its ``expert_counts`` [depth, E, 2] of all ranks."""
        for number, block in self.blocks.items():
            layer: Any = block.feed_forward
            layer.move_bias(counts[int(number)])  # by number: rows are those of the whole depth

    def all_blocks(self) -> list[nn.Module]:
        """The blocks of the vision tower, where it has one, then those of the decoder."""
        tower = [] if self.vision is None else self.vision.blocks.values()
        return [*tower, *self.blocks.values()]

    def context(self, batch: Batch, dtype: torch.dtype) -> BlockContext:
        """What all blocks share of a batch."""
        kinds, config = position_kinds(self.config, batch), self.config
        positions, hi = rotary_positions(config, batch), ends_seen(config, batch)
        return make_context(config, positions, batch.lo, hi, config.head_dim, dtype, **kinds)

    def logits(self, batch: Batch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Logits [B, S, V] of every position."""
        return self.head.logits(self.residual_stream(batch, dtype), self.tied_table)
