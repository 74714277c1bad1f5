"""The native multimodal model: one decoder over packed rows of text tokens and image patches.

    early: pixels -> one linear layer -> decoder
    late:  pixels -> ViT, per image   -> decoder
    text:  image positions keep the placeholder's embedding (a blind baseline)

Single-device mathematics only. Shape suffixes: b rows, s positions, w width.
"""

import math
from typing import NamedTuple

import torch
from megamm_kernels import (
    AttentionPlan,
    attention_plan,
    default_backend,
    linear_cross_entropy,
    multimodal_embedding,
    multimodal_patch_embedding,
    rope_table,
)
from torch import nn

from megamm.config import ModelConfig
from megamm.data.batch import Batch
from megamm.data.tokens import MODALITIES
from megamm.errors import InputError
from megamm.model.layers import Block, Linear, RMSNorm
from megamm.model.sizes import hidden_width, resolve_model
from megamm.model.vision import PatchProjection, VisionTower


class LossOutput(NamedTuple):
    """Summed next-token losses of a batch.

    Attributes:
        loss: scalar, differentiable; the sum over labelled positions, in nats.
        sums: float32 [num_sources, num_modalities], the same sum split up, detached.
        counts: float32, same shape; number of labels.
    """

    loss: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor


class MultimodalModel(nn.Module):
    """Decoder with SwiGLU, RMSNorm, QK-norm, RoPE and untied embeddings; no biases (arXiv 2504.07951)."""

    def __init__(self, config: ModelConfig, num_sources: int = 1):
        super().__init__()
        resolve_model(config)
        self.config, self.num_sources = config, num_sources
        width, eps = config.width, config.norm_eps
        hidden = hidden_width(width, config.hidden_multiple)
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, width).normal_(std=1.0))
        self.vision = make_vision(config)
        self.patches_per_image = (config.image_size // config.patch_size) ** 2
        self.blocks = nn.ModuleList(
            Block(width, config.head_dim, hidden, config.depth, eps) for _ in range(config.depth)
        )
        self.norm = RMSNorm(width, eps)
        self.head = Linear(width, config.vocab_size, 1 / width)

    def hidden_states(self, batch: Batch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Final normalised states [B, S, W] of every position, in ``dtype``."""
        x_bsw = self.embed(batch, dtype)
        cos, sin = rope_table(batch.positions, self.config.head_dim, self.config.rope_theta)
        plan = self.plan_attention(batch.lo, batch.hi, dtype)
        for block in self.blocks:
            x_bsw = block(x_bsw, cos, sin, plan)
        return self.norm(x_bsw)

    def embed(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Decoder input [B, S, W]: text rows of the table, and at image positions what the architecture has there."""
        tokens, index = batch.tokens, batch.patch_index
        if self.config.architecture == "early":
            projection = self.vision.projection.weight
            return multimodal_patch_embedding(tokens, self.embedding, batch.patches, projection, index, dtype)
        features = self.image_features(batch, dtype) if self.vision else None
        return multimodal_embedding(tokens, self.embedding, features, index, dtype)

    def plan_attention(self, lo: torch.Tensor, hi: torch.Tensor, dtype: torch.dtype) -> AttentionPlan:
        """What all blocks share of the mask of rows (lo, hi), for the configured backend.

        Raises:
            InputError: the backend cannot run here, or not on these rows.
        """
        backend = self.config.attention.backend or default_backend(lo)
        try:
            return attention_plan(lo, hi, dtype, backend)
        except (ImportError, ValueError) as error:
            raise InputError(f"model.attention.backend: {error}") from error

    def image_features(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """The vision tower's features [P, W] of the batch's patches.

        A batch without images still runs a black one: ranks whose micro-batches have images must find all
        others in the same collectives, and an optimizer step must not depend on how rows are split.
        """
        length, count = self.patches_per_image, batch.patches.shape[0]
        patches = batch.patches if count else batch.patches.new_zeros(length, batch.patches.shape[1])
        lo = torch.zeros(patches.shape[0] // length, length, dtype=torch.int32, device=patches.device)
        plan = self.plan_attention(lo, lo + (length - 1), dtype)  # each image is a row that sees all of itself
        return self.vision(patches, dtype, plan)[:count]

    def forward(self, batch: Batch, dtype: torch.dtype = torch.float32) -> LossOutput:
        """Next-token loss on labelled positions; only their rows reach the head."""
        x_nw = self.hidden_states(batch, dtype).flatten(0, 1)
        shape = (self.num_sources, len(MODALITIES))
        group = batch.source.int() * len(MODALITIES) + batch.modality
        loss, sums, counts, _ = linear_cross_entropy(
            x_nw, self.head.weight, batch.targets.flatten(), batch.label_index, group.flatten(), math.prod(shape)
        )
        return LossOutput(loss, sums.view(shape), counts.view(shape))


def make_vision(config: ModelConfig) -> nn.Module | None:
    """The image front end of an architecture; None for the blind one."""
    patch_dim = 3 * config.patch_size**2
    if config.architecture == "text":
        return None
    if config.architecture == "early":
        return PatchProjection(patch_dim, config.width)
    vision = config.vision
    return VisionTower(
        patch_dim=patch_dim,
        patches_per_image=(config.image_size // config.patch_size) ** 2,
        width=vision.width,
        head_dim=vision.head_dim,
        hidden=hidden_width(vision.width, config.hidden_multiple),
        depth=vision.depth,
        out_width=config.width,
        rope_theta=config.rope_theta,
        eps=config.norm_eps,
    )
