"""AdamW, or Muon on the matrices of the blocks, with weight decay that is not multiplied by the learning rate."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from megamm.config import OptimizerConfig
from megamm.errors import InputError
from megamm.training.muon import Muon, muon_parts
from megamm.training.offload import OffloadedAdamW

TOWER_PREFIXES = ("vision.embed.", "vision.blocks.", "vision.norm.")
"""Parameters of the late-fusion vision tower; its projector learns at the decoder's rate."""


def freeze(model: nn.Module, config: OptimizerConfig) -> list[nn.Parameter]:
    """Leave parameters as they began: a vision tower whose rate is 0, and what ``optimizer.freeze`` names.

    What is frozen to the end gets no gradients, hence no decay and no state of the optimizer.

    Returns:
        What is frozen until ``optimizer.freeze_until``; see :func:`held_back`.
    """
    held, prefixes = [], tuple(config.freeze)
    for name, parameter in model.named_parameters():
        in_tower = config.vision_lr_factor == 0 and name.startswith(TOWER_PREFIXES)
        if in_tower or (prefixes and name.startswith(prefixes) and config.freeze_until is None):
            parameter.requires_grad_(False)
        elif prefixes and name.startswith(prefixes):
            held.append(parameter)
    return held


def check_freeze(names: Iterable[str], config: OptimizerConfig) -> None:
    """Check that ``optimizer.freeze`` names parameters of the model, and not all.

    Args:
        names: of all parameters of the whole model.

    Raises:
        InputError: it does not.
    """
    names = list(names)  # gone through more than once
    for prefix in config.freeze:
        if not any(name.startswith(prefix) for name in names):
            parts = sorted({name.split(".")[0] + "." for name in names})
            raise InputError(f"optimizer.freeze: no parameter's name begins with {prefix!r}; parts: {', '.join(parts)}")
    if config.freeze and all(name.startswith(tuple(config.freeze)) for name in names):
        raise InputError("optimizer.freeze: names every parameter, so nothing would be trained")


@contextmanager
def held_back(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let parameters seem frozen within the block: they have no state of the optimizer yet, so none is loaded.

    Outside of it they have gradients, which the step drops: what is sharded notes once whether it has any.
    """
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimizer over parameter groups, each with its ``peak_lr``; frozen parameters are left out.

    Groups: matrices and vectors (norm scales and biases: no decay), the vision tower of late fusion apart, with its own
    learning-rate factor; with Muon, what it steps. torch multiplies weight decay by the learning rate, so
    ``weight_decay / peak_lr`` is passed: a step then removes ``weight_decay * schedule`` of each weight, whatever the
    rate.

    Args:
        dtype: of Muon's matrix products.
    """
    muon = muon_parts(model) if config.name == "muon" else {}
    groups: dict[tuple[bool, bool, str], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # By name and not by number of dims: scales of heads have two.
            in_tower, decays = name.startswith(TOWER_PREFIXES), "norm" not in name and not name.endswith("bias")
            parts = muon.get(parameter)
            peak = config.lr * (config.vision_lr_factor if in_tower else 1.0)
            # A tower whose rate is 0 is frozen, so peak is never 0 here.
            decay = config.weight_decay / peak if decays else 0.0
            group = {"params": [], "lr": peak, "peak_lr": peak, "weight_decay": decay}
            if config.name == "muon":
                group["parts"] = parts
            # Parts as text: keys are sorted, and None and Parts have no order among them.
            groups.setdefault((in_tower, decays, repr(parts)), group)["params"].append(parameter)
    # Not in the order of the first parameter of each, which would depend on which part of the model lies here.
    ordered = [group for _, group in sorted(groups.items())]
    options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    if config.name == "muon":
        return Muon(ordered, momentum=config.momentum, dtype=dtype, **options)
    return (OffloadedAdamW if config.offload else torch.optim.AdamW)(ordered, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        # From the peak each time, not from the last rate: nothing builds up, and a resumed run has the same one.
        group["lr"] = factor * group["peak_lr"]
