"""Widths that follow from others."""

import math

from megamm.config import ModelConfig


def hidden_width(width: int, multiple: int) -> int:
    """SwiGLU hidden width: 8/3 of the width, rounded up to a multiple."""
    return multiple * math.ceil((8 * width // 3) / multiple)


def default_head_dim(width: int) -> int:
    """The multiple of 8 nearest to 64 that divides the width."""
    divisors = [d for d in range(8, width + 1, 8) if width % d == 0]
    return min(divisors, key=lambda d: (abs(d - 64), d))


def resolve_model(config: ModelConfig) -> ModelConfig:
    """Fill in head width and vision tower where they default to other settings, in place."""
    config.head_dim = config.head_dim or default_head_dim(config.width)
    vision = config.vision
    vision.head_dim = vision.head_dim or config.head_dim
    vision.depth = vision.depth or config.depth
    vision.width = vision.width or vision.head_dim * -(-config.width // (2 * vision.head_dim))
    return config
