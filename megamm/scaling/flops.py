"""Parameter and FLOPs counts of a model, from its settings alone.

Two accountings, both logged with every run:

* ``paper``: the 6ND forms of arXiv 2504.07951. Dense: 6 N D. Late fusion: 6 (N_v D_v + N D), where N_v is the
  vision tower's parameters, D_v the image patches, N the decoder's parameters (with both embedding tables and
  the projector) and D all positions.
* ``exact``: every matrix product of forward and backward, counting two operations per multiply-add: linear
  layers at the positions that reach them, attention over the pairs that the mask admits, the head at labelled
  positions only, and no gradient with respect to pixels.

Element-wise work (norms, rotary embedding, SwiGLU, softmax) is left out of both.
"""

from dataclasses import dataclass

from megamm.config import ModelConfig
from megamm.model.sizes import hidden_width


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Number of parameters: ``decoder`` (with embedding, head, patch projection or projector), ``vision``."""

    decoder: int
    vision: int

    @property
    def total(self) -> int:
        return self.decoder + self.vision


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """What a training set holds per position of a packed row (padding counts as a position).

    Attributes:
        patches: image patches.
        labels: labelled positions.
        pairs: query-key pairs that the interval mask admits.
    """

    patches: float
    labels: float
    pairs: float


def block_parameters(width: int, hidden: int, head_dim: int) -> int:
    """One transformer block: attention 4 w^2, SwiGLU 3 w f, two norms and two per-head norms."""
    return 4 * width**2 + 3 * width * hidden + 2 * width + 2 * head_dim


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count parameters of a resolved model config (see ``megamm.resolve``)."""
    width, patch_dim = config.width, 3 * config.patch_size**2
    hidden = hidden_width(width, config.hidden_multiple)
    decoder = config.depth * block_parameters(width, hidden, config.head_dim)
    decoder += 2 * config.vocab_size * width + width
    vision = 0
    if config.architecture == "early":
        decoder += patch_dim * width
    elif config.architecture == "late":
        v = config.vision
        vision = v.depth * block_parameters(v.width, hidden_width(v.width, config.hidden_multiple), v.head_dim)
        vision += patch_dim * v.width + v.width
        decoder += v.width * width
    return ParameterCounts(decoder=decoder, vision=vision)


def paper_flops(counts: ParameterCounts, tokens: float, patches: float) -> float:
    """6 N D, plus 6 N_v D_v for a vision tower.

    Args:
        counts: from :func:`count_parameters`.
        tokens: positions trained on, D.
        patches: image patches among them, D_v.
    """
    return 6 * (counts.decoder * tokens + counts.vision * patches)


def exact_flops_per_token(config: ModelConfig, stats: TokenStats) -> float:
    """Operations of forward and backward per position."""
    width = config.width
    hidden = hidden_width(width, config.hidden_multiple)
    total = config.depth * _block_flops(width, hidden, 1.0, stats.pairs)
    total += 6 * config.vocab_size * width * stats.labels
    patch_dim = 3 * config.patch_size**2
    if config.architecture == "early":
        total += 4 * patch_dim * width * stats.patches
    elif config.architecture == "late":
        v = config.vision
        patches_per_image = (config.image_size // config.patch_size) ** 2
        v_hidden = hidden_width(v.width, config.hidden_multiple)
        total += v.depth * _block_flops(v.width, v_hidden, stats.patches, stats.patches * patches_per_image)
        total += 4 * patch_dim * v.width * stats.patches + 6 * v.width * width * stats.patches
    return total


def _block_flops(width: int, hidden: int, positions: float, pairs: float) -> float:
    """Forward and backward of a block: 6 per weight and position; attention 2 products forward, 4 backward.

    Recomputing the scores in the backward is not counted, as is usual for MFU.
    """
    linear = 6 * positions * (4 * width**2 + 3 * width * hidden)
    attention = 6 * 2 * pairs * width
    return linear + attention
