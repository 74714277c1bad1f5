"""Widths that follow from others."""

import math

from megamm.config import ModelConfig, default_decoder_head_dim, default_head_dim


def hidden_width(width: int, multiple: int) -> int:
    """SwiGLU hidden width: 8/3 of the width, rounded up to a multiple."""
    # SwiGLU has three matrices: with 8/3 they have as many weights as two of 4 times the width.
    return multiple * math.ceil((8 * width // 3) / multiple)


def decoder_hidden(config: ModelConfig) -> int:
    """SwiGLU hidden width of the decoder."""
    return config.hidden or hidden_width(config.width, config.hidden_multiple)


def tower_hidden(config: ModelConfig) -> int:
    """Hidden width of the vision tower's feed-forward layers; with a resolved tower."""
    vision = config.vision
    default = hidden_width(vision.width, config.hidden_multiple) if vision.kind == "megamm" else 4 * vision.width
    return vision.hidden or default


def tower_eps(config: ModelConfig) -> float:
    """What the vision tower's norms add to the variance."""
    return config.vision.norm_eps or {"megamm": config.norm_eps, "clip": 1e-5, "siglip": 1e-6}[config.vision.kind]


def tower_activation(config: ModelConfig) -> str:
    """Activation function of a CLIP or SigLIP tower."""
    return config.vision.activation or ("quick_gelu" if config.vision.kind == "clip" else "gelu_tanh")


def tower_patch_size(config: ModelConfig) -> int:
    """Patch height and width of the vision tower."""
    return config.vision.patch_size or config.patch_size


def shuffle_ratio(config: ModelConfig) -> int:
    """Patches of the tower, in a row and in a column, that make up one patch of the model."""
    return config.patch_size // tower_patch_size(config)


def has_learnt_positions(config: ModelConfig) -> bool:
    """Whether the model has a vision tower that takes square images of ``image_size`` alone."""
    return config.architecture == "late" and config.vision.kind != "megamm"


def num_heads(config: ModelConfig) -> int:
    """Heads of queries of the decoder; with a resolved ``head_dim``."""
    return config.heads or config.width // config.head_dim


def resolve_model(config: ModelConfig) -> ModelConfig:
    """Fill in head width, key heads, experts and vision tower where they default to other settings, in place."""
    if config.head_dim is None:
        config.head_dim = config.width // config.heads if config.heads else default_decoder_head_dim(config.width)
    config.key_heads = config.key_heads or num_heads(config)
    if config.experts.num:
        config.experts.hidden = config.experts.hidden or decoder_hidden(config)
    vision = config.vision
    vision.depth = vision.depth or config.depth
    step = vision.head_dim or config.head_dim
    # Half of the decoder's width, in whole heads.
    vision.width = vision.width or step * -(-config.width // (2 * step))
    if vision.head_dim is None:
        fits = vision.width % config.head_dim == 0
        vision.head_dim = config.head_dim if fits else default_head_dim(vision.width)
    return config
