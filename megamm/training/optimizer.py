"""AdamW with weight decay that is not multiplied by the learning rate."""

import torch
from torch import nn

from megamm.config import OptimizerConfig

TOWER_PREFIXES = ("vision.embed.", "vision.blocks.", "vision.norm.")
"""Parameters of the late-fusion vision tower; its projector learns at the decoder's rate."""


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over parameter groups, each with its ``peak_lr``.

    Groups: matrices and vectors (norm scales: no decay), the vision tower of late fusion apart, with its own
    learning-rate factor. torch multiplies weight decay by the learning rate, so ``weight_decay / peak_lr`` is
    passed: a step then removes ``weight_decay * schedule`` of each weight, whatever the rate.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        in_tower = name.startswith(TOWER_PREFIXES)
        groups.setdefault((in_tower, "norm" not in name), []).append(parameter)
    options = []
    for (in_tower, decays), parameters in sorted(groups.items()):
        peak = config.lr * (config.vision_lr_factor if in_tower else 1.0)
        decay = config.weight_decay / peak if decays else 0.0
        options.append({"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    return torch.optim.AdamW(options, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
