"""Rotary positions beyond the kernels' table: stretched wavelengths, and rotation without a norm."""

import math

import torch
from megamm_kernels import rope_table

from megamm.config import RopeScalingConfig


def rotary_table(
    positions: torch.Tensor | tuple[torch.Tensor, torch.Tensor], head_dim: int, theta: float, scaling: RopeScalingConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotation angles, float32 [B, L, 1, D / 2]; as ``rope_table`` where nothing is stretched.

    Args:
        positions: integers [B, L]; or two of them, rows and columns, which turn every other pair of entries (rotary
            positions of images as in Qwen2-VL, arXiv 2409.12191, section 2.1, with the wavelengths dealt in turn).
        head_dim: width D of a head.
        theta: base of the geometric series of wavelengths.
        scaling: how they are stretched.
    """
    if isinstance(positions, tuple):
        # In turn, not in halves: rows and columns both get long and short wavelengths.
        by_row, by_column = (rotary_table(one, head_dim, theta, scaling) for one in positions)
        takes_row = torch.arange(head_dim // 2, device=by_row[0].device) % 2 == 0
        cos, sin = (torch.where(takes_row, row, column) for row, column in zip(by_row, by_column, strict=True))
        return cos, sin
    if scaling.kind == "none":
        return rope_table(positions, head_dim, theta)
    angles = positions[..., None, None].float() * frequencies(head_dim, theta, scaling).to(positions.device)
    return angles.cos(), angles.sin()


def frequencies(head_dim: int, theta: float, scaling: RopeScalingConfig) -> torch.Tensor:
    """Radians per position of each pair of entries, float32 [D / 2].

    llama3: between the two limits of the wavelength the share of the plain frequency rises with
    original_length / wavelength (Llama 3.1, reference code ``apply_scaling``).
    """
    # Made on the CPU: the same numbers whatever the device.
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling.kind == "none":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    # Wavelengths that fit often into a row of the first training were learnt in full and stay; those that never came
    # round are stretched.
    turns = scaling.original_length * plain / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: stays as it is; 0: stretched in full
    return share * plain + (1 - share) * plain / scaling.factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads [B, L, H, D] by position: entry i pairs with entry i + D / 2, as in ``qk_norm_rope``.

    Args:
        cos, sin: float32 [B or 1, L, 1, D / 2]. The product is taken in float32 at least, as the kernels do.
    """
    first, second = x.chunk(2, dim=-1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    first, second = first.to(dtype), second.to(dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
