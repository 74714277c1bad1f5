"""Learning rate over steps: linear warm-up, constant, cool-down."""

import math

from megamm.config import ScheduleConfig


def cooldown_start(config: ScheduleConfig, steps: int) -> int:
    """First step of the cool-down of a run of ``steps`` steps (``steps`` where there is none)."""
    if config.cooldown == "none":
        return steps
    return steps - round(config.cooldown_fraction * steps)


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Share of the peak rate at ``step`` (0-based) of ``steps``.

    The warm-up reaches 1 at its last step. Over the cool-down, with u the share of it gone by, the factor
    falls from 1 to 0 as ``1 - u`` (linear), ``1 - sqrt(u)`` (one_minus_sqrt, Hagele et al. 2024,
    arXiv 2405.18392), ``(1 + cos(pi u)) / 2`` (cosine) or as 1 / sqrt(1 + 8u) shifted and scaled to
    end at 0 (inverse_sqrt).
    """
    # step + 1: the first step is not wasted on a rate of 0.
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    start = cooldown_start(config, steps)
    if step < start:
        return warmup
    # u is 0 at the last constant step and would be 1 just after the last one: no step is made with a rate of 0.
    u = (step - start + 1) / (steps - start + 1)
    match config.cooldown:
        case "linear":
            shape = 1 - u
        case "one_minus_sqrt":
            shape = 1 - math.sqrt(u)
        case "cosine":
            shape = (1 + math.cos(math.pi * u)) / 2
        case "inverse_sqrt":
            shape = (1 / math.sqrt(1 + 8 * u) - 1 / 3) / (1 - 1 / 3)
    # In a run that cools down before its warm-up ends both hold.
    return warmup * shape
